"""The CPU engine's learned_conv2d: drawn and selected by the engine, convolved by torch.

Scores are taught by the engine too. Weights that are flipped or rescaled are the reference's; so are the
gradients that go through the scale, those of the weight, and those of float64 scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_conv2d import reference
from fastmask.ops.learned_linear.cpu import draw, score_grad
from fastmask.ops.masked_conv2d import cpu as masked

DTYPES = (torch.float32, torch.bfloat16)


def learned_conv2d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    """Images x (B, C, H, W) through W' of each group's sample, and the packed bits (S, bytes)."""
    active = draw(scores, seed, method, samples, mu, density)
    geometry = (stride, padding, dilation, groups)
    if off == "zero" and not rescale:
        return masked.masked_conv2d(x, weight, active, bias, *geometry), active
    weights = reference.weights_of(weight, active, off, rescale, x.dtype)
    return reference.conv2d(x, reference.laid_out(weights, weight), bias, *geometry), active


def learned_conv2d_grad(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dx, dL/dW, dL/dscores, dL/dbias; those not asked for are empty."""
    geometry = (stride, padding, dilation, groups)
    selected = output_mask[0] and off == "zero" and not rescale
    fused = output_mask[2] and not rescale and scores.dtype != torch.float64
    rest = [output_mask[0] and not selected, False, False, output_mask[3]]
    dx, dw, dscores, dbias = reference.learned_conv2d_grad(
        grad,
        x,
        weight,
        scores,
        active,
        seed,
        input_size,
        *geometry,
        method,
        tau,
        off,
        rescale,
        rest,
    )
    if selected:
        dx = masked.grad_input(grad, weight, active, input_size, *geometry)
    if output_mask[1] or output_mask[2]:
        assert x is not None
        dtype = reference.wide(grad, scores)
        g = reference.conv2d_grad_weights(
            grad.to(dtype), x.to(dtype), len(active), list(weight.shape), *geometry
        )
    if output_mask[1]:
        dw = reference.weight_grad(g, weight, active, off, rescale).contiguous()
    if fused:
        dscores = score_grad(g, weight, scores, seed, tau, off, g[0] if len(g) == 1 else None)
    elif output_mask[2]:
        dscores = reference.score_grad(
            g, weight, scores, active, seed, method, tau, off, rescale
        ).contiguous()
    return dx, dw, dscores, dbias
