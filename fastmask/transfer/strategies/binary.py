"""The binary mask: learn which weights the source needs, by the Gumbel-sigmoid and straight-through."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.errors import TrainingDiverged
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source, finite
from fastmask.transfer.strategies.found import Found, MaskWarning, RunningMean

# The mean loss of a batch: from what the masked layer gives for it, and from which of the rows it is.
Loss = Callable[[Tensor, Tensor], Tensor]


def find(config: Config, source: Source, part: Part) -> Found:
    """Minimise `CE(B * W) + beta * sum(l)` over logits l, `P(B = 1) = sigmoid(l)`, by Adam; freeze the kept.

    Every step draws `samples` masks, each for an equal part of the batch. The gradient of the cross-
    entropy is straight-through (`fastmask.ops.learned_linear`); that of the regulariser, beta or
    `beta * sigmoid'(l)`, is added to it, by default in units of a running mean of |dCE/dl|. Logits are
    held to +-`logit_clamp`. Frozen are the largest logits, a share of `density`, or `l > 0` for None.

    Args:
        config: settings from `tau` to `density`.
        source: the source-trained head; its weights stay as they are.
        part: its training rows, at least `samples`.

    Raises:
        TrainingDiverged: the loss or a logit's gradient is not finite.

    Warns:
        MaskWarning: `l > 0` freezes nothing or everything, or over half of the logits are at their bound.

    Source: arXiv 2308.13957, 5.3.
    """

    def labels(out: Tensor, rows: Tensor) -> Tensor:
        return functional.cross_entropy(out, part.y[rows])

    return learn("binary", config, source, part, labels)


def learn(strategy: str, config: Config, source: Source, part: Part, loss_of: Loss) -> Found:
    """Minimise `loss_of(B * W) + beta * sum(l)` over logits l as `find` does for the cross-entropy.

    Args:
        strategy: its name: of the run, and the key of what it draws.
        config, source, part: as for `find`.
        loss_of: mean loss of a batch, from the layer's output (B, N) and the places (B,) of its rows.
    """
    run = f"{strategy} mask of {source.domain}, seed {source.seed}"
    weight, bias = source.trained[MASKED], source.trained["output.bias"]
    inputs = source.head.last_input(source.head.inputs(part.x))
    draws = generator(source.seed, strategy, source.domain)
    logits = nn.Parameter(torch.full_like(weight, config.logit_init))
    optimizer = torch.optim.Adam([logits], lr=config.mask_lr)
    scale = RunningMean()
    rows = min(config.batch, len(part.y)) // config.samples * config.samples
    losses = []
    for step, batch in enumerate(orders(len(part.y), rows, config.mask_steps, draws)):
        optimizer.zero_grad()
        seed = int(torch.randint(2**62, (), generator=draws))
        out = ops.learned_linear(
            inputs[batch],
            weight,
            logits,
            bias=bias,
            seed=seed,
            samples=config.samples,
            tau=config.tau,
        )
        loss = loss_of(out, batch)
        losses.append(finite(loss, run, step))
        loss.backward()
        assert logits.grad is not None
        regularise(logits.grad, logits.detach(), config, scale)
        _clip(logits.grad, config.mask_clip, run, step)
        optimizer.step()
        with torch.no_grad():
            logits.clamp_(-config.logit_clamp, config.logit_clamp)
    mean = sum(losses[-50:]) / len(losses[-50:])
    return result(config, run, logits.detach(), mean, scale.value)


def result(config: Config, run: str, logits: Tensor, loss: float, scale: float | None) -> Found:
    """The mask that learned logits stand for, and the figures of its run.

    Args:
        config: settings from `tau` to `density`.
        run: what warnings call it.
        logits: as learned.
        loss: mean of the last steps, in nats.
        scale: running mean of |dL/dl|; None where beta is absolute.

    Warns:
        MaskWarning: as `find`.
    """
    notes = {
        "steps": config.mask_steps,
        "loss": loss,
        "share_positive": float((logits > 0).float().mean()),
        "share_at_clamp": float((logits.abs() >= config.logit_clamp).float().mean()),
        "mean_logit": float(logits.mean()),
        "gradient_scale": scale if scale is not None else 1.0,
    }
    return Found(_frozen(logits, config, run, notes["share_at_clamp"]), logits, notes)


def regularise(grad: Tensor, logits: Tensor, config: Config, scale: RunningMean) -> None:
    """Add the regulariser's gradient to that of the cross-entropy."""
    unit = 1.0 if config.beta_unit == "absolute" else scale(float(grad.abs().mean()))
    if config.reg == "logit":
        grad.add_(config.beta * unit)
    else:
        active = torch.sigmoid(logits)
        grad.add_(active * (1.0 - active), alpha=config.beta * unit)


def _clip(grad: Tensor, most: float | None, run: str, step: int) -> None:
    """Shorten the gradient to norm `most`; raise TrainingDiverged where it is not finite."""
    norm = float(grad.norm())
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"{run}: the gradient of the logits has norm {norm} at step {step + 1}; a smaller beta or "
            "larger tau keeps it finite"
        )
    if most is not None and norm > most:
        grad.mul_(most / norm)


def _frozen(logits: Tensor, config: Config, run: str, at_clamp: float) -> BitMask:
    if at_clamp > 0.5:
        warnings.warn(
            f"{run}: {100 * at_clamp:.0f} % of the logits are at +-{config.logit_clamp:g}, their bound; "
            "a smaller beta leaves the choice to the data",
            MaskWarning,
            stacklevel=3,
        )
    if config.density is not None:
        return BitMask(ops.topk_mask(logits, config.density), logits.shape)
    frozen = BitMask(ops.pack(logits, 0.0), logits.shape)
    if frozen.count() in (0, frozen.numel()):
        share = "nothing" if frozen.count() == 0 else "everything"
        warnings.warn(
            f"{run}: l > 0 freezes {share} (beta = {config.beta:g}); `density` freezes a given share",
            MaskWarning,
            stacklevel=3,
        )
    return frozen
