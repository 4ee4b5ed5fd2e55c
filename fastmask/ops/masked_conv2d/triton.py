"""Triton's masked_conv2d: weights selected by their bits in one launch, convolutions by torch.

A convolution of one place (1 x 1, stride 1, one group) over channels_last images is a linear layer over their
pixels: where they are few beside the weight it goes to masked_linear, which reads W through its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask._triton import weights
from fastmask.ops.masked_conv2d.reference import (
    conv2d,
    conv2d_grad_input,
    conv2d_grad_weights,
)
from fastmask.ops.masked_linear import triton as linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Images x (B, C, H, W) through where(active, W, 0) of each group's mask, plus bias."""
    if _is_linear(x, weight.shape, active, stride, padding, groups):
        y = linear.masked_linear(_pixels(x), weight.flatten(1), active, bias, None)
        return _images(y, x)
    selected = weights.select(weight, active)
    return conv2d(x, selected, bias, stride, padding, dilation, groups)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    active: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dL/dx, the transposed convolution of dY with where(active, W, 0)."""
    if _is_linear(grad, weight.shape, active, stride, padding, groups):
        dx = linear.grad_input(_pixels(grad), weight.flatten(1), active, None)
        return _images(dx, grad)
    selected = weights.select(weight, active)
    return conv2d_grad_input(grad, selected, input_size, stride, padding, dilation, groups)


def grad_weight(
    grad: Tensor,
    x: Tensor,
    active: Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dL/dW_s, 0), summed in float32."""
    dense = conv2d_grad_weights(
        grad, x, len(active), weight_size, stride, padding, dilation, groups
    )
    return weights.add_selected(dense, active)


def _is_linear(
    images: Tensor,
    weight_size: torch.Size,
    active: Tensor,
    stride: list[int],
    padding: list[int],
    groups: int,
) -> bool:
    (N, C, *kernel), last = weight_size, torch.channels_last
    if kernel != [1, 1] or stride != [1, 1] or padding != [0, 0] or groups != 1:
        return False
    if images.is_contiguous() or not images.is_contiguous(memory_format=last) or not len(images):
        return False
    pixels = _pixels(images)
    # It saves writing and reading selected weights, which is nothing beside many pixels.
    if len(pixels) * (N + C) > 10 * N * C:
        return False
    return linear._planned(pixels, N, C, len(active), None).path != "scratch"


def _pixels(images: Tensor) -> Tensor:
    """Images in channels_last (B, C, H, W) as rows (B H W, C) of the same memory."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (B H W, N) as images (B, N, H, W) in channels_last."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)
