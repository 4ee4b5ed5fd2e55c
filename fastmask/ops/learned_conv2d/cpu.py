"""The CPU engine's learned_conv2d: drawn and selected by the engine, convolved by torch.

Weights that are flipped or rescaled, and the rule that teaches weights and scores, are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_conv2d import reference
from fastmask.ops.learned_linear.cpu import draw
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
    rest = [output_mask[0] and not selected, *output_mask[1:]]
    dx, *others = reference.learned_conv2d_grad(
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
    dw, dscores, dbias = others
    return dx, dw, dscores, dbias
