"""The CPU engine's learned_weight: drawn, selected and taught by the engine.

The gradients of the weight, and those of float64 scores, are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_linear.cpu import draw, score_grad, weights_of
from fastmask.ops.learned_weight import reference

DTYPES = (torch.float32, torch.bfloat16)


def learned_weight(
    weight: Tensor,
    scores: Tensor,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    """W' (S, *W.shape) of the samples, and their packed bits (S, bytes)."""
    active = draw(scores, seed, method, samples, mu, density)
    return weights_of(weight, active, off, rescale, weight.dtype), active


def learned_weight_grad(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/dscores of G = dL/dW' (S, *W.shape); those not asked for are empty."""
    fused = output_mask[1] and scores.dtype != torch.float64
    rest = [output_mask[0], output_mask[1] and not fused]
    dw, dscores = reference.learned_weight_grad(
        grad, weight, scores, active, seed, method, tau, off, rescale, rest
    )
    if fused:
        dscores = score_grad(grad.float(), weight, scores, active, seed, tau, off, rescale)
    return dw, dscores
