"""Specification of learned_weight: learned_linear's rule for the weight, and no product."""

from __future__ import annotations

from torch import Tensor

from fastmask.ops.learned_linear.reference import draw, score_grad, weight_grad, weights_of, wide


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
    return weights_of(weight, active, off, rescale, weight.dtype).contiguous(), active


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
    dw, dscores = weight.new_empty(0), scores.new_empty(0)
    g = grad.to(wide(grad, scores))
    if output_mask[0]:
        dw = weight_grad(g, weight, active, off, rescale)
    if output_mask[1]:
        dscores = score_grad(g, weight, scores, active, seed, method, tau, off, rescale)
    return dw.contiguous(), dscores.contiguous()
