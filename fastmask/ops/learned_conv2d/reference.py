"""Specification of learned_conv2d: learned_linear's rule for the weight, torch's convolution for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_linear.reference import draw, score_grad, weight_grad, weights_of, wide
from fastmask.ops.masked_conv2d.reference import (
    conv2d,
    conv2d_grad_input,
    conv2d_grad_weights,
    laid_out,
)


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
    weights = laid_out(weights_of(weight, active, off, rescale, x.dtype), weight)
    return conv2d(x, weights, bias, stride, padding, dilation, groups), active


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
    dx, dw, dbias = (grad.new_empty(0) for _ in range(3))
    dscores = scores.new_empty(0)
    geometry = (stride, padding, dilation, groups)
    if output_mask[0]:
        weights = laid_out(weights_of(weight, active, off, rescale, grad.dtype), weight)
        dx = conv2d_grad_input(grad, weights, input_size, *geometry)
    if output_mask[1] or output_mask[2]:
        assert x is not None
        dtype = wide(grad, scores)
        g = conv2d_grad_weights(
            grad.to(dtype), x.to(dtype), len(active), list(weight.shape), *geometry
        )
    if output_mask[1]:
        dw = weight_grad(g, weight, active, off, rescale)
    if output_mask[2]:
        dscores = score_grad(g, weight, scores, active, seed, method, tau, off, rescale)
    if output_mask[3]:
        # In float64: thousands of places of either sign add up, and it costs little beside a convolution.
        dbias = grad.sum(dim=(0, 2, 3), dtype=torch.float64).to(grad.dtype)
    return dx, dw.contiguous(), dscores.contiguous(), dbias
