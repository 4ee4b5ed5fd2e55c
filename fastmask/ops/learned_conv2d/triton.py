"""Triton's learned_conv2d: learned_weight's kernels for the weight, torch's convolutions for the rest.

The gradient in each sample's weight is torch's, in the dtype of the images: float32 convolutions of 16-bit
images would not run on the tensor cores. From there on sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask._triton import weights
from fastmask.ops.learned_linear.triton import draw, scale
from fastmask.ops.learned_weight import triton as learned
from fastmask.ops.masked_conv2d.reference import conv2d, conv2d_grad_input, conv2d_grad_weights

DTYPES = learned.DTYPES


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
    flip = off == "flip"
    if weights.drawn_at_once(weight, scores) and method != "topk" and not rescale:
        chosen, active = weights.draw(weight, scores, seed, samples, mu, flip)
    else:
        active = draw(scores, seed, method, samples, mu, density)
        a = scale(active, weight.numel()) if rescale else None
        chosen = weights.select(weight, active, flip, a)
    return conv2d(x, chosen, bias, stride, padding, dilation, groups), active


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
        a = scale(active, weight.numel()) if rescale else None
        chosen = weights.select(weight, active, off == "flip", a)
        dx = conv2d_grad_input(grad, chosen, input_size, *geometry)
    if output_mask[1] or output_mask[2]:
        assert x is not None
        g = conv2d_grad_weights(grad, x, len(active), list(weight.shape), *geometry)
        dw, dscores = learned.learned_weight_grad(
            g, weight, scores, active, seed, method, tau, off, rescale, output_mask[1:3]
        )
    if output_mask[3]:
        dbias = grad.sum(dim=(0, 2, 3), dtype=torch.float64).to(grad.dtype)
    return dx, dw, dscores, dbias
