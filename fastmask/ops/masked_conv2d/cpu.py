"""The CPU engine's masked_conv2d: weights selected by their bits in one pass, convolutions by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.masked_conv2d import reference
from fastmask.ops.masked_conv2d.reference import (
    conv2d,
    conv2d_grad_input,
    conv2d_grad_weights,
    laid_out,
)
from fastmask.ops.masked_linear.cpu import select

DTYPES = (torch.float32, torch.bfloat16)


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
    weights = laid_out(select(weight, active), weight)
    return conv2d(x, weights, bias, stride, padding, dilation, groups)


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
    weights = laid_out(select(weight, active), weight)
    return conv2d_grad_input(grad, weights, input_size, stride, padding, dilation, groups)


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
    """dL/dW = sum over masks of where(active_s, dL/dW_s, 0)."""
    if grad.dtype != torch.float32:
        return reference.grad_weight(
            grad, x, active, weight_size, stride, padding, dilation, groups
        )
    dense = conv2d_grad_weights(
        grad, x, len(active), weight_size, stride, padding, dilation, groups
    )
    out, active = dense.new_empty(weight_size), active.contiguous()
    for s, (bits, one) in enumerate(zip(active, dense, strict=True)):
        _cpu.add_selected(
            one.data_ptr(),
            bits.data_ptr(),
            out.numel(),
            int(s > 0),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out
