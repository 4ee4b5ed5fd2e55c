"""Stage 3: fine-tune layers and head on the target while frozen entries keep their bits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fastmask.bits import BitMask
from fastmask.optim import MaskedSGD, verify_frozen
from fastmask.transfer.batches import generator, orders, schedule
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.network.model import Network, Values, area, groups
from fastmask.transfer.network.source import Source
from fastmask.transfer.plan import Run
from fastmask.transfer.source import finite


def start_values(source: Source, run: Run, frozen: Mapping[str, BitMask] | None) -> Values:
    """The values stage 3 begins with, as for a head alone.

    Before stage 1 a layer of the backbone held its pretrained values: they are its `source-start`.
    A random start draws it anew within 1 / sqrt(fan_in), torch's own first values.

    Args:
        source: the source-trained network.
        run: which run.
        frozen: masks by the parameter's name; None for the baselines.

    Source: arXiv 2308.13957, 5.4.
    """
    if run.strategy == "scratch":
        return source.initial
    if frozen is None or run.start == "source-end":
        return source.trained
    found = dict(source.trained)
    for name, mask in frozen.items():
        free = source.initial[name] if run.start == "source-start" else _drawn(source, run, name)
        found[name] = torch.where(mask.to_bool(), found[name], free)
    return found


def _drawn(source: Source, run: Run, name: str) -> Tensor:
    weight = source.trained[name]
    bound = 1.0 / math.sqrt(weight[0].numel())
    draws = generator(run.seed, "random", source.domain, name)
    return torch.empty(weight.shape).uniform_(-bound, bound, generator=draws).to(weight)


def fine_tune(
    config: Config,
    base: Network,
    source: Source,
    run: Run,
    part: Part,
    frozen: Mapping[str, BitMask] | None,
) -> tuple[Network, float]:
    """Minimise the cross-entropy on the target by SGD with momentum, entry by entry where it is free.

    The head steps with `target_lr`, a layer of the backbone with `layers_target_lr` times the mean squared
    length of one unit's pretrained weights. Batches depend on the seed and the target alone.

    Args:
        config: settings named `target_*`, `layers_target_lr` and `train_unmasked`.
        base: the network with the backbone's values.
        source: the source-trained values.
        run: which run.
        part: the target's training rows, as the network holds them.
        frozen: masks by the parameter's name, 1 = frozen; None for the baselines.

    Returns:
        The fine-tuned network and the mean loss of its last 20 steps.

    Raises:
        TrainingDiverged: the loss is not finite; names run and step.
        FrozenEntriesMoved: a frozen entry, or anything else in the network that this run does not train,
            differs as an integer from what it began with.

    Source: arXiv 2308.13957, 5.4; the optimizer is not stated there.
    """
    network = base.with_values(start_values(source, run, frozen))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = network.parameters_of(masked_alone=not config.train_unmasked)
    for param in trained.values():
        param.requires_grad_(True)
    lengths = groups(
        trained, base, lambda _: config.target_lr, lambda m: config.layers_target_lr * area(m)
    )
    optimizer = MaskedSGD(
        lengths,
        momentum=config.target_momentum,
        weight_decay=config.target_weight_decay,
        frozen={trained[name]: mask for name, mask in (frozen or {}).items()},
    )
    first = [group["lr"] for group in optimizer.param_groups]
    network.learning(True)
    losses = []
    order = orders(
        len(part.y), config.batch, config.target_steps, generator(run.seed, "target", run.target)
    )
    for step, rows in enumerate(order):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * schedule(config.target_schedule, step, config.target_steps)
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(part.x[rows]), part.y[rows])
        losses.append(finite(loss, str(run), step))
        loss.backward()
        optimizer.step()
    network.learning(False)
    network.requires_grad_(False)
    finite(network(part.x[:1]).sum(), str(run), config.target_steps - 1)
    verify_frozen(before, network.state_dict(), _fixed(network, trained, frozen or {}))
    return network, sum(losses[-20:]) / len(losses[-20:])


def _fixed(
    network: Network, trained: Mapping[str, Tensor], frozen: Mapping[str, BitMask]
) -> dict[str, BitMask]:
    """Which entries of the network no run may have moved: the masks', and all of what is not trained."""
    moving = {*trained, *network.moving_statistics()}
    return {
        name: BitMask.ones(value.shape, value.device)
        for name, value in network.state_dict().items()
        if name not in moving
    } | dict(frozen)
