"""Stage 3: fine-tune on the target while frozen entries keep their bits; the baselines likewise."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from fastmask.bits import BitMask
from fastmask.optim import MaskedSGD, verify_frozen
from fastmask.transfer.batches import generator, orders, schedule
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED, Head
from fastmask.transfer.plan import Run
from fastmask.transfer.source import Source, Values, finite, values, with_values


def start_values(source: Source, run: Run, frozen: BitMask | None) -> Values:
    """The values stage 3 begins with.

    Unmasked fine-tuning begins with the source-trained values, scratch with the initial ones. A masked
    run takes frozen entries, and parameters without a mask, as the source left them, and the free
    entries from before stage 1 (source-start), after it (source-end), or drawn anew (random).

    Args:
        source: the source-trained head.
        run: which run.
        frozen: the mask of the last layer; None for the baselines.

    Source: arXiv 2308.13957, 5.4.
    """
    if run.strategy == "scratch":
        return dict(source.initial)
    if frozen is None or run.start == "source-end":
        return dict(source.trained)
    trained = source.trained[MASKED]
    if run.start == "source-start":
        free = source.initial[MASKED]
    else:
        bound = 1.0 / math.sqrt(trained.shape[1])
        draws = generator(run.seed, "random", source.domain)
        free = torch.empty(trained.shape).uniform_(-bound, bound, generator=draws).to(trained)
    return {**source.trained, MASKED: torch.where(frozen.to_bool(), trained, free)}


def fine_tune(
    config: Config, source: Source, run: Run, part: Part, frozen: BitMask | None
) -> tuple[Head, float]:
    """Minimise the cross-entropy on the target by SGD with momentum, entry by entry where it is free.

    Batches depend on the seed and the target alone, so that runs which share both see the same rows.

    Args:
        config: settings named `target_*`, and `train_unmasked`.
        source: the source-trained head.
        run: which run.
        part: the target's training rows.
        frozen: the mask of the last layer, 1 = frozen; None for the baselines.

    Returns:
        The fine-tuned head and the mean loss of its last 20 steps.

    Raises:
        TrainingDiverged: the loss is not finite; names run and step.
        FrozenEntriesMoved: a frozen entry differs, compared as an integer, from what it began with.

    Source: arXiv 2308.13957, 5.4; the optimizer is not stated there.
    """
    start = start_values(source, run, frozen)
    head = with_values(source.head, start)
    trained = {
        name: param
        for name, param in head.named_parameters()
        if name == MASKED or config.train_unmasked
    }
    for param in trained.values():
        param.requires_grad_(True)
    optimizer = MaskedSGD(
        trained.values(),
        lr=config.target_lr,
        momentum=config.target_momentum,
        weight_decay=config.target_weight_decay,
        frozen={} if frozen is None else {trained[MASKED]: frozen},
    )
    losses = []
    order = orders(
        len(part.y), config.batch, config.target_steps, generator(run.seed, "target", run.target)
    )
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = config.target_lr * schedule(
            config.target_schedule, step, config.target_steps
        )
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(head.inputs(part.x[rows])), part.y[rows])
        losses.append(finite(loss, str(run), step))
        loss.backward()
        optimizer.step()
    finite(head(head.inputs(part.x[:1])).detach().sum(), str(run), config.target_steps - 1)
    head.requires_grad_(False)
    verify_frozen(start, values(head), _fixed(head, trained, frozen))
    return head, sum(losses[-20:]) / len(losses[-20:])


def _fixed(
    head: Head, trained: dict[str, torch.nn.Parameter], frozen: BitMask | None
) -> dict[str, BitMask]:
    """Which entries of the head no run may have moved: the mask's, and all of what is not trained."""
    fixed = {
        name: BitMask.ones(param.shape, param.device)
        for name, param in head.named_parameters()
        if name not in trained
    }
    return fixed if frozen is None else {**fixed, MASKED: frozen}
