"""The editor mask: see how far each weight can be edited with the source kept; freeze the least edited."""

from __future__ import annotations

import warnings

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
_EVERY, _ROWS = 10, 4096


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
    run = f"editor mask of {source.domain}, seed {source.seed}"
    weight, bias = source.trained[MASKED], source.trained["output.bias"]
    inputs = source.head.last_input(source.head.inputs(part.x))
    unedited = functional.log_softmax(functional.linear(inputs, weight, bias), 1)

    def keep(edit: Tensor, rows: Tensor) -> Tensor:
        logits = functional.linear(inputs[rows], weight + edit, bias)
        if config.editor_preserve == "ce":
            return functional.cross_entropy(logits, part.y[rows])
        edited = functional.log_softmax(logits, 1)
        return functional.kl_div(edited, unedited[rows], reduction="batchmean", log_target=True)

    draws = generator(source.seed, "editor", source.domain)
    spread = float(weight.std())
    cap = config.editor_cap * spread
    first = torch.randn(weight.shape, generator=draws) * (config.editor_init * spread)
    edit = nn.Parameter(first.to(weight.device))
    optimizer = torch.optim.Adam([edit], lr=config.editor_lr * spread, eps=1e-12)
    scale = RunningMean()
    everything = torch.randperm(len(part.y), generator=draws)[:_ROWS]
    before = finite(keep(torch.zeros_like(weight), everything), run, 0)
    within, steps, loss = edit.detach().clone(), 0, before
    order = orders(len(part.y), config.batch, config.editor_steps, draws)
    for step, rows in enumerate(order):
        optimizer.zero_grad()
        batch_loss = keep(edit, rows)
        finite(batch_loss, run, step)
        batch_loss.backward()
        assert edit.grad is not None
        unit = (
            1.0 if config.editor_beta_unit == "absolute" else scale(float(edit.grad.abs().mean()))
        )
        edit.grad.add_(edit.detach().sign(), alpha=config.editor_beta * unit)
        optimizer.step()
        with torch.no_grad():
            edit.clamp_(-cap, cap)
        if (step + 1) % _EVERY == 0 or step + 1 == config.editor_steps:
            with torch.no_grad():
                now = finite(keep(edit, everything), run, step)
            if now > before + config.editor_tolerance:
                break
            within, steps, loss = edit.detach().clone(), step + 1, now
    size = within.abs()
    notes = {
        "steps": steps,
        "loss_before": before,
        "loss": loss,
        "share_at_cap": float((size >= cap).float().mean()),
        "mean_over_std": float(size.mean() / size.std()) if float(size.std()) > 0 else 0.0,
    }
    return Found(least_edited(size, config, run), within, notes)


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
