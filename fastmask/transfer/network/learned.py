"""The masks `binary` and `kl` of several layers at once, by the masked modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.bits import BitMask
from fastmask.errors import TrainingDiverged
from fastmask.masks import GumbelMask
from fastmask.nn import mask_
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.network.found import FoundMasks
from fastmask.transfer.network.model import Network, batched
from fastmask.transfer.network.source import Source
from fastmask.transfer.source import finite
from fastmask.transfer.strategies.binary import regularise, result
from fastmask.transfer.strategies.found import RunningMean


class _SeededMask(GumbelMask):
    """A Gumbel mask whose noise is that of `seed`, not of torch's generator, which all threads share."""

    seed = 0

    def learned_options(self) -> dict[str, Any]:
        return {**super().learned_options(), "seed": self.seed}


def find(config: Config, strategy: str, base: Network, source: Source, part: Part) -> FoundMasks:
    """Minimise `keep(B * W) + beta * sum(l)` over the logits of all masked layers by Adam; freeze the kept.

    As for a head alone, with a unit of beta for each layer. `keep` is the labels' cross-entropy (binary)
    or the KL divergence from the unmasked outputs (kl). Sample s of every layer goes with part s of
    the batch. The network is in evaluation: its norms stay as stage 1 left them.

    Args:
        config: settings from `tau` to `scope`.
        strategy: `binary` or `kl`.
        base: the network with the backbone's values.
        source: the source-trained values.
        part: its training rows, at least `samples`, as the network holds them.

    Raises:
        TrainingDiverged: the loss or a logit's gradient is not finite.

    Warns:
        MaskWarning: `l > 0` freezes nothing or everything, or over half of the logits are at their bound.

    Source: arXiv 2308.13957, 5.3 and 7.
    """
    run = f"{strategy} mask of {source.domain}, seed {source.seed}"
    network = base.with_values(source.trained)
    unmasked = batched(lambda x: functional.log_softmax(network(x), 1), part.x)
    wanted = set(network.masked)
    template = _SeededMask(config.logit_init, config.tau, config.samples)
    mask_(network, template, lambda name, _: name in wanted)
    network.requires_grad_(False)
    drawn: dict[str, _SeededMask] = {}
    for name in network.masked:
        mask = network.get_submodule(f"{name}.mask")
        assert isinstance(mask, _SeededMask)
        drawn[f"{name}.weight"] = mask.train()
    logits = {name: mask.logits.requires_grad_(True) for name, mask in drawn.items()}
    draws = generator(source.seed, strategy, source.domain)
    optimizer = torch.optim.Adam(logits.values(), lr=config.mask_lr)
    scales = {name: RunningMean() for name in logits}
    rows = min(config.batch, len(part.y)) // config.samples * config.samples
    losses = []
    for step, batch in enumerate(orders(len(part.y), rows, config.mask_steps, draws)):
        optimizer.zero_grad()
        for mask in drawn.values():
            mask.seed = int(torch.randint(2**62, (), generator=draws))
        out = network(part.x[batch])
        if strategy == "kl":
            now = functional.log_softmax(out, 1)
            loss = functional.kl_div(now, unmasked[batch], reduction="batchmean", log_target=True)
        else:
            loss = functional.cross_entropy(out, part.y[batch])
        losses.append(finite(loss, run, step))
        loss.backward()
        for name, own in logits.items():
            assert own.grad is not None
            regularise(own.grad, own.detach(), config, scales[name])
        _clip(logits, config.mask_clip, run, step)
        optimizer.step()
        with torch.no_grad():
            for own in logits.values():
                own.clamp_(-config.logit_clamp, config.logit_clamp)
    mean = sum(losses[-50:]) / len(losses[-50:])
    found = {name: own.detach() for name, own in logits.items()}
    return _frozen(config, run, found, mean, {name: s.value for name, s in scales.items()})


def _clip(logits: Mapping[str, Tensor], most: float | None, run: str, step: int) -> None:
    """Shorten the gradient of all logits to norm `most`; raise where it is not finite."""
    norm = float(nn.utils.clip_grad_norm_(logits.values(), math.inf if most is None else most))
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"{run}: the gradient of the logits has norm {norm} at step {step + 1}; a smaller beta or "
            "larger tau keeps it finite"
        )


def _frozen(
    config: Config,
    run: str,
    logits: Mapping[str, Tensor],
    loss: float,
    scales: Mapping[str, float | None],
) -> FoundMasks:
    """Masks by the scope: a share of each layer, or of all logits as one list."""
    if config.scope == "layer":
        each = {
            name: result(config, f"{run}, {name}", own, loss, scales[name])
            for name, own in logits.items()
        }
        notes = {name: found.notes for name, found in each.items()}
        return FoundMasks({name: found.frozen for name, found in each.items()}, logits, notes)
    whole = result(config, run, torch.cat([own.flatten() for own in logits.values()]), loss, None)
    ones = whole.frozen.to_bool().split([own.numel() for own in logits.values()])
    frozen = {
        name: BitMask.from_bool(part.view(own.shape))
        for part, (name, own) in zip(ones, logits.items(), strict=True)
    }
    units = {name: 1.0 if scale is None else scale for name, scale in scales.items()}
    return FoundMasks(frozen, logits, {**whole.notes, "gradient_scale": units})
