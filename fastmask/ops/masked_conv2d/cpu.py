"""The CPU engine's masked_conv2d: weights selected by their bits in one pass, convolutions by torch.

A selected weight lies in memory that lives from call to call: torch reads it in the call and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmask.ops import _scratch
from fastmask.ops.masked_conv2d import reference
from fastmask.ops.masked_linear import cpu as linear

DTYPES = (torch.float32, torch.bfloat16)
# One mask may come as (bytes,).
FLAT = True


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

    def product(part: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(part, w, bias, stride, padding, dilation, groups)

    return _by_mask(x, weight, active, product)


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
    return _by_mask(
        grad,
        weight,
        active,
        lambda part, w: reference.conv2d_grad_input(
            part, [w], [len(part), *input_size[1:]], stride, padding, dilation, groups
        ),
    )


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
    samples, dtype, active = len(active), grad.dtype, active.contiguous()
    if samples > 1:
        grad, x = grad.float(), x.float()
    dense = reference.conv2d_grad_weights(
        grad, x, samples, weight_size, stride, padding, dilation, groups
    )
    if samples == 1:
        linear._select_into(dense[0], dense[0], active.data_ptr())
        return dense[0]
    out = dense.new_empty(weight_size)
    for s, (bits, one) in enumerate(zip(active, dense, strict=True)):
        linear._add_selected(one, bits, s > 0, out)
    return out.to(dtype)


def _both_grads(
    grad: Tensor, x: Tensor, weight: Tensor, active: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    """dL/dx and the gradient (1, *W.shape) of the selected weight, where one mask is and all lies in order.

    One call of torch's has the bits of two, and puts what both read into its own layout once.
    """
    stride, padding, dilation, groups = geometry

    def product(dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
        )  # fmt: skip
        return dx.contiguous(), dw.contiguous().unsqueeze(0)

    return _by_mask(grad, weight, active, product)


def _by_mask(
    images: Tensor, weight: Tensor, active: Tensor, product: Callable[[Tensor, Tensor], Any]
) -> Any:
    """The product of each mask's images with where(active, W, 0), which has the strides of W."""
    active, plain, size = (
        active.contiguous(),
        weight.is_contiguous(),
        (weight.nbytes + 63) // 64 * 64,
    )
    alone = active.dim() == 1 or active.shape[0] == 1
    block = _scratch.take(size if plain else 2 * size)
    try:
        if alone and plain:
            chosen = block.view(weight.dtype).as_strided(weight.shape, weight.stride())
            linear._select_into(chosen, weight, active.data_ptr())
            return product(images, chosen)
        active = active.view(-1, active.shape[-1])
        parts = zip(images.tensor_split(len(active)), active, strict=True)
        done = [product(part, _selected(weight, bits, block, size)) for part, bits in parts]
        return done[0] if alone else torch.cat(done)
    finally:
        _scratch.give(block)


def _selected(weight: Tensor, bits: Tensor, block: Tensor, size: int) -> Tensor:
    """where(bits, W, 0) in the block, in its second `size` bytes where W does not lie in logical order."""
    chosen = block[: weight.nbytes].view(weight.dtype).view(weight.shape)
    if weight.is_contiguous():
        linear._select_into(chosen, weight, bits.data_ptr())
        return chosen.as_strided(weight.shape, weight.stride())
    linear._select_into(chosen, chosen.copy_(weight), bits.data_ptr())
    strides = torch.empty_like(weight, device="meta").stride()
    return block[size:].view(weight.dtype).as_strided(weight.shape, strides).copy_(chosen)
