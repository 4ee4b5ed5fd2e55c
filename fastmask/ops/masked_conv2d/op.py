"""masked_conv2d: a convolution whose weight is read through packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _eager
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register
from fastmask.ops.masked_conv2d import reference
from fastmask.ops.masked_linear.op import linear_operands

Pair = int | Sequence[int]
Padding = Pair | str


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute `conv2d(x, where(active, weight, 0), bias)` with the mask read from packed bits.

    A masked-out weight contributes exactly 0, even where it is NaN or infinite. With S masks the images
    of x are S equal consecutive groups.

    Args:
        x: floating (B, C, H, W), or one image (C, H, W); any memory format.
        weight: (N, C / groups, R, T), dtype of x, any memory format; its bits are in logical order.
        active: packed bits of the weight, uint8 (bytes,) or (S, bytes); 1 takes part.
        bias: (N,), dtype of x, or None.
        stride: steps, one number or one for each of height and width.
        padding: zeros on either side, one number or a pair; `valid` is none, `same` keeps H and W.
        dilation: spacing of the kernel's elements, one number or a pair.
        groups: number of groups of channels; C for a depthwise convolution.
        backend: `auto` or the name of a back end.

    Returns:
        (B, N, H', W') or (N, H', W'), dtype of x, in the memory format that `conv2d` gives.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; an option is out of its range; S does not
            divide B.
        BackendUnavailable: the back end named cannot run.

    Gradients: x; weight, `where(active, dW, 0)` summed over masks; bias. Once differentiable.
    Deterministic: as `torch.nn.functional.conv2d`. Autocast: as `torch.nn.functional.conv2d`.
    """
    refused = None
    if (
        _eager.unwatched()
        and _fits(x, weight, active, bias)
        and _plain(stride)
        and _plain(padding)
        and _plain(dilation)
        and type(groups) is int
    ):
        try:
            return _undispatched(
                x, weight, active, bias, stride, padding, dilation, groups, backend
            )
        except (RuntimeError, TypeError, ValueError) as error:
            refused = (
                error  # by torch: where arguments are wrong, that is said below in words of ours
            )
    images, weight, bias, geometry = conv2d_arguments(
        x, weight, bias, stride, padding, dilation, groups
    )
    _checks.packed("active", active, weight.numel(), "weight", weight)
    active = active.unsqueeze(0) if active.dim() == 1 else active
    _checks.images(images, active.shape[0], "active")
    if refused is not None:
        raise refused
    out = _MaskedConv2d.apply(images, weight, active, bias, *geometry, backend)
    return out.squeeze(0) if x.dim() == 3 else out


Geometry = tuple[list[int], list[int], list[int], int]


def _plain(value: Padding) -> bool:
    return type(value) is int or (type(value) is tuple and len(value) == 2)


def _fits(x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None) -> bool:
    """Whether all is plain memory of the CPU and one mask has a bit a weight; torch checks the rest."""
    ordinary, dtype, n = _eager.ordinary, x.dtype, weight.numel()
    return (
        ordinary(x)
        and ordinary(weight)
        and ordinary(active)
        and dtype in _checks.FLOATING
        and dtype is weight.dtype
        and active.dtype is torch.uint8
        and x.dim() == weight.dim() == 4
        and active.dim() == 1
        and active.numel() == packed_bytes(n) > 0
        and (bias is None or (ordinary(bias) and bias.dtype is dtype))
    )


def _undispatched(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, *geometry_and_backend: Any
) -> Tensor:
    """What the op computes for one mask (bytes,), past torch's dispatcher.

    A convolution leaves no code in the caches: dispatching and its Python, 0.09 ms in a loop, then take
    0.4 (64 channels of 56 x 56 pixels, Zen 4), these 0.1, of which a view of the bits would be 0.03.
    """
    *sizes, groups, backend = geometry_and_backend
    geometry = (*([v, v] if isinstance(v, int) else [*v] for v in sizes), groups)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Undispatched.apply(x, weight, active.unsqueeze(0), bias, *geometry, backend)
    module = _backend.resolve("masked_conv2d", backend, "cpu", x.dtype)
    masks = active if getattr(module, "FLAT", False) else active.unsqueeze(0)
    return module.masked_conv2d(x, weight, masks, bias, *geometry)


def conv2d_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    """Check all that every convolution takes; return a batch of images, operands under autocast, pairs."""
    _checks.floating("x", x)
    _checks.floating("weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape (N, C / groups, R, T), none of them 0, got {tuple(weight.shape)}"
        )
    _checks.count("groups", groups)
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a number that divides the {weight.shape[0]} output channels of weight, "
            f"got {groups}"
        )
    channels = weight.shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"x: expected shape (B, {channels}, H, W) or ({channels}, H, W) for weight "
            f"{tuple(weight.shape)} with groups={groups}, got {tuple(x.shape)}"
        )
    steps, spacing = _checks.pair("stride", stride, 1), _checks.pair("dilation", dilation, 1)
    total = [d * (r - 1) for d, r in zip(spacing, weight.shape[2:], strict=True)]
    x, weight, bias = linear_operands(x, weight, bias)
    x = x.unsqueeze(0) if x.dim() == 3 else x
    if isinstance(padding, str):
        _checks.one_of("padding", padding, ("same", "valid"))
        if padding == "same" and steps != [1, 1]:
            raise ValueError(f"padding: 'same' needs stride 1, got {tuple(steps)}")
        zeros = [t // 2 if padding == "same" else 0 for t in total]
        if padding == "same" and any(t % 2 for t in total):
            # As torch: the zero that has no partner goes below and to the right.
            x = F.pad(x, [0, total[1] % 2, 0, total[0] % 2])
    else:
        zeros = _checks.pair("padding", padding, 0)
    for size, pad, reach in zip(x.shape[2:], zeros, total, strict=True):
        if size + 2 * pad < reach + 1:
            raise ValueError(
                f"x: expected images in which the kernel fits, {tuple(t + 1 for t in total)} with its "
                f"dilation, got {tuple(x.shape[2:])} with padding {tuple(zeros)}"
            )
    return x, weight, bias, (steps, zeros, spacing, groups)


class _MaskedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        active: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        backend: str,
    ) -> Tensor:
        return torch.ops.fastmask.masked_conv2d(
            x, weight, active, bias, stride, padding, dilation, groups, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, active, _, *ctx.rest = inputs
        ctx.sizes = x.shape, weight.shape
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            active,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active = ctx.saved_tensors
        x_size, weight_size = ctx.sizes
        dx = dw = db = None
        plain = _eager.plain_call(grad, x, weight, active)
        if ctx.needs_input_grad[0]:
            of_input = _grad_input if plain else torch.ops.fastmask.masked_conv2d_grad_input
            dx = of_input(grad, weight, active, x_size, *ctx.rest)
        if ctx.needs_input_grad[1]:
            of_weight = _grad_weight if plain else torch.ops.fastmask.masked_conv2d_grad_weight
            dw = of_weight(grad, x, active, weight_size, *ctx.rest)
        if ctx.needs_input_grad[3]:
            db = grad.sum(dim=(0, 2, 3))
        return dx, dw, None, db, None, None, None, None, None


class _Undispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _MaskedConv2d.setup_context(ctx, inputs, inputs[0])
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _MaskedConv2d.backward(ctx, *grads)


def _forward(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, *geometry_and_backend: Any
) -> Tensor:
    *geometry, backend = geometry_and_backend
    module = _backend.resolve("masked_conv2d", backend, x.device, x.dtype)
    return module.masked_conv2d(x, weight, active, bias, *geometry)


def _forward_fake(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, *geometry_and_backend: Any
) -> Tensor:
    return reference.conv2d(x, [weight], bias, *geometry_and_backend[:-1])


def _grad_input(
    grad: Tensor, weight: Tensor, active: Tensor, size: list[int], *geometry_and_backend: Any
) -> Tensor:
    *geometry, backend = geometry_and_backend
    module = _backend.resolve("masked_conv2d", backend, grad.device, grad.dtype)
    return module.grad_input(grad, weight, active, size, *geometry)


def _grad_input_fake(
    grad: Tensor, weight: Tensor, active: Tensor, size: list[int], *geometry_and_backend: Any
) -> Tensor:
    return reference.conv2d_grad_input(grad, [weight], size, *geometry_and_backend[:-1])


def _grad_weight(
    grad: Tensor, x: Tensor, active: Tensor, size: list[int], *geometry_and_backend: Any
) -> Tensor:
    *geometry, backend = geometry_and_backend
    module = _backend.resolve("masked_conv2d", backend, grad.device, grad.dtype)
    return module.grad_weight(grad, x, active, size, *geometry)


def _grad_weight_fake(
    grad: Tensor, x: Tensor, active: Tensor, size: list[int], *geometry_and_backend: Any
) -> Tensor:
    return grad.new_empty(size)


_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups, str backend"

register(
    f"masked_conv2d(Tensor x, Tensor weight, Tensor active, Tensor? bias, {_GEOMETRY}) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "masked_conv2d_grad_input(Tensor grad, Tensor weight, Tensor active, SymInt[] input_size, "
    f"{_GEOMETRY}) -> Tensor",
    _grad_input,
    _grad_input_fake,
)
register(
    "masked_conv2d_grad_weight(Tensor grad, Tensor x, Tensor active, SymInt[] weight_size, "
    f"{_GEOMETRY}) -> Tensor",
    _grad_weight,
    _grad_weight_fake,
)
