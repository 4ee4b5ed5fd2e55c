"""Specification of masked_conv2d: select, never multiply, then torch's convolution for each mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.ops.masked_linear.reference import select
from fastmask.ops.unpack.reference import unpack


def laid_out(weights: Tensor, like: Tensor) -> list[Tensor]:
    """Each of the weights (S, N, C, R, T) in the memory format of `like`: it decides that of the output."""
    alike = torch.empty_like(like, dtype=weights.dtype, device="meta").stride()
    return [
        w if w.stride() == alike else w.new_empty_strided(w.shape, alike).copy_(w) for w in weights
    ]


def conv2d(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Images x (B, C, H, W), S equal consecutive groups, through the weights of their masks."""
    parts = [
        F.conv2d(part, w, bias, stride, padding, dilation, groups)
        for part, w in zip(x.tensor_split(len(weights)), weights, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def conv2d_grad_input(
    grad: Tensor,
    weights: list[Tensor],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dL/dx (B, C, H, W) for the weights of each group's mask."""
    last = grad.is_contiguous(memory_format=torch.channels_last) and not grad.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    parts = []
    for part, w in zip(grad.tensor_split(len(weights)), weights, strict=True):
        # Of the input the size and the memory format are read, not the values.
        size = (len(part), *input_size[1:])
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        dx, _, _ = torch.ops.aten.convolution_backward(
            part, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        parts.append(dx)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.contiguous(memory_format=memory_format)


def conv2d_grad_weights(
    grad: Tensor,
    x: Tensor,
    samples: int,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dL/dW_s of each mask's images, (S, N, C / groups, R, T)."""
    # Of the weight the size is read, not the values.
    w = x.new_empty(weight_size)
    parts = []
    for dy, part in zip(grad.tensor_split(samples), x.tensor_split(samples), strict=True):
        _, dw, _ = torch.ops.aten.convolution_backward(
            dy, part, w, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
        )  # fmt: skip
        parts.append(dw)
    return (parts[0].unsqueeze(0) if samples == 1 else torch.stack(parts)).contiguous()


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
    """dL/dW = sum over masks of where(active_s, dL/dW_s, 0), summed in float32 where there are several."""
    samples, dtype = len(active), grad.dtype
    if samples > 1 and dtype.itemsize < 4:
        grad, x = grad.float(), x.float()
    dense = conv2d_grad_weights(
        grad, x, samples, weight_size, stride, padding, dilation, groups
    )  # fmt: skip
    ones = unpack(active, dense[0].numel()).view_as(dense)
    return torch.where(ones, dense, dense.new_zeros(())).sum(dim=0).to(dtype)
