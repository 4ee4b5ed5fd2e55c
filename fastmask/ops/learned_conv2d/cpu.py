"""The CPU engine's learned_conv2d: drawn and selected by the engine, convolved by torch.

Scores are taught by the engine too. The gradients of the weight, and those of float64 scores, are the
reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_conv2d import reference
from fastmask.ops.learned_linear.cpu import draw, score_grad, weights_of
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
    weights = weights_of(weight, active, off, rescale, x.dtype)
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
    rest = [False, False, False, output_mask[3]]
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
    plain, together = off == "zero" and not rescale, False
    if output_mask[1] or output_mask[2]:
        assert x is not None
        dtype, samples = reference.wide(grad, scores), len(active)
        ordered = all(t.is_contiguous() and t.dtype == dtype for t in (grad, x, weight))
        together = output_mask[0] and plain and samples == 1 and ordered
        if together:
            dx, g = masked._both_grads(grad, x, weight, active, *geometry)
        else:
            g = reference.conv2d_grad_weights(
                grad.to(dtype), x.to(dtype), samples, list(weight.shape), *geometry
            )
    if output_mask[0] and plain and not together:
        dx = masked.grad_input(grad, weight, active, input_size, *geometry)
    elif output_mask[0] and not plain:
        weights = reference.laid_out(weights_of(weight, active, off, rescale, grad.dtype), weight)
        dx = reference.conv2d_grad_input(grad, weights, input_size, *geometry)
    if output_mask[1]:
        dw = reference.weight_grad(g, weight, active, off, rescale).contiguous()
    if output_mask[2] and scores.dtype != torch.float64:
        into = g[0] if len(g) == 1 else None
        dscores = score_grad(g, weight, scores, active, seed, tau, off, rescale, into)
    elif output_mask[2]:
        dscores = reference.score_grad(
            g, weight, scores, active, seed, method, tau, off, rescale
        ).contiguous()
    return dx, dw, dscores, dbias
