"""The editor mask: see how far each weight can be edited with the source kept; freeze the least edited."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source, finite
from fastmask.transfer.strategies.found import Found, MaskWarning, RunningMean

# The loss on the source is looked at this often, on this many of its rows or on all.
EVERY, ROWS = 10, 4096


def find(config: Config, source: Source, part: Part) -> Found:
    """Minimise `keep(W + dW) + beta * sum |dW|` over dW by Adam; freeze `|dW| < mean|dW| - k * std|dW|`.

    `keep` is the labels' cross-entropy, or the KL divergence from the unedited outputs. beta < 0 rewards
    edits, so that the objective has no minimum: |dW| is held to `editor_cap * std(W)`, and the search
    stops when `keep` on the source exceeds its value at W by the tolerance; the last edit within it
    counts. The first edit is random and small: where a weight is never used its gradient is 0, and from
    exactly 0 it would never move and be frozen for it.

    Args:
        config: settings named `editor_*`.
        source: the source-trained head.
        part: its training rows.

    Raises:
        TrainingDiverged: the loss is not finite.

    Warns:
        MaskWarning: the rule freezes nothing.

    Source: arXiv 2308.13957, 5.2.
    """
    weight = source.trained[MASKED]
    cap = config.editor_cap * float(weight.std())

    def hold(edit: Tensor) -> None:
        edit.clamp_(-cap, cap)

    edit, said = learn("editor", config, source, part, weight.shape, lambda edit: edit, hold)
    run = f"editor mask of {source.domain}, seed {source.seed}"
    return Found(least_edited(edit.abs(), config, run), edit, said)


def learn(
    strategy: str,
    config: Config,
    source: Source,
    part: Part,
    shape: torch.Size,
    edit_of: Callable[[Tensor], Tensor],
    hold: Callable[[Tensor], None],
) -> tuple[Tensor, dict[str, float]]:
    """Minimise the objective of `find` over coordinates c of an edit `dW = edit_of(c)` by Adam.

    `edit_of` is linear and keeps lengths, so that a step of all c moves an entry of dW as far on the mean
    square, however few c there are: steps and first values are in `std(W) * sqrt(entries / coordinates)`.

    Args:
        strategy: its name: of the run, and the key of what it draws.
        config, source, part: as for `find`.
        shape: of c.
        edit_of: dW (N, K) from c.
        hold: brings c, in place, back to where |dW| is within its bound.

    Returns:
        The last edit within the tolerance, and the figures of its run.
    """
    run = f"{strategy} mask of {source.domain}, seed {source.seed}"
    weight, bias = source.trained[MASKED], source.trained["output.bias"]
    inputs = source.head.last_input(source.head.inputs(part.x))
    unedited = functional.log_softmax(functional.linear(inputs, weight, bias), 1)

    def keep(edit: Tensor, rows: Tensor) -> Tensor:
        logits = functional.linear(inputs[rows], weight + edit, bias)
        if config.editor_preserve == "ce":
            return functional.cross_entropy(logits, part.y[rows])
        edited = functional.log_softmax(logits, 1)
        return functional.kl_div(edited, unedited[rows], reduction="batchmean", log_target=True)

    draws = generator(source.seed, strategy, source.domain)
    unit = float(weight.std()) * math.sqrt(weight.numel() / shape.numel())
    first = torch.randn(shape, generator=draws) * (config.editor_init * unit)
    place = nn.Parameter(first.to(weight))
    optimizer = torch.optim.Adam([place], lr=config.editor_lr * unit, eps=1e-12)
    scale = RunningMean()
    everything = torch.randperm(len(part.y), generator=draws)[:ROWS]
    before = finite(keep(torch.zeros_like(weight), everything), run, 0)
    within, steps, loss = edit_of(place.detach()).clone(), 0, before
    order = orders(len(part.y), config.batch, config.editor_steps, draws)
    for step, rows in enumerate(order):
        optimizer.zero_grad()
        edit = edit_of(place)
        here = edit.detach().requires_grad_()
        batch_loss = keep(here, rows)
        finite(batch_loss, run, step)
        batch_loss.backward()
        assert here.grad is not None
        mean = float(here.grad.abs().mean())
        push = 1.0 if config.editor_beta_unit == "absolute" else scale(mean)
        here.grad.add_(here.detach().sign(), alpha=config.editor_beta * push)
        edit.backward(here.grad)
        optimizer.step()
        with torch.no_grad():
            hold(place)
        if (step + 1) % EVERY == 0 or step + 1 == config.editor_steps:
            with torch.no_grad():
                edit = edit_of(place.detach()).clone()
                now = finite(keep(edit, everything), run, step)
            if now > before + config.editor_tolerance:
                break
            within, steps, loss = edit, step + 1, now
    cap = config.editor_cap * float(weight.std())
    return within, notes(within, cap, steps, before, loss)


def notes(edit: Tensor, cap: float, steps: int, before: float, loss: float) -> dict[str, float]:
    """The figures of an edit's run: steps within the tolerance, losses before and after, its sizes."""
    size = edit.abs()
    return {
        "steps": steps,
        "loss_before": before,
        "loss": loss,
        "share_at_cap": float((size >= cap).float().mean()),
        "mean_over_std": float(size.mean() / size.std()) if float(size.std()) > 0 else 0.0,
    }


def least_edited(size: Tensor, config: Config, run: str) -> BitMask:
    """Freeze by the rule: `size < mean - k * std` (strict), or the smallest `editor_share` of all.

    Warns:
        MaskWarning: the threshold of `std` is not above 0, as for a Laplace edit (mean = std), or it
            lies below every size: nothing is frozen.
    """
    if config.editor_rule == "quantile":
        return BitMask(ops.topk_mask(-size, config.editor_share), size.shape)
    frozen = BitMask.from_bool(size < size.mean() - config.editor_k * size.std())
    if frozen.count() == 0:
        warnings.warn(
            f"{run}: no |dW| lies below mean - {config.editor_k:g} std "
            f"({float(size.mean()):.3g} - {config.editor_k:g} * {float(size.std()):.3g}), so that "
            "nothing is frozen; editor_rule='quantile' freezes a given share",
            MaskWarning,
            stacklevel=2,
        )
    return frozen
