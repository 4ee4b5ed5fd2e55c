"""Checks of the ops that update many tensors in one call, and the selection they end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.ops import _checks
from fastmask.ops._layout import packed_bytes


def updated(params: Sequence[Tensor]) -> None:
    """Raise unless `params` is a list of floating tensors that can be written, of one device and dtype."""
    listed("params", params, len(params) if isinstance(params, list | tuple) else 0)
    if not _plain(params, params):
        for i, param in enumerate(params):
            _checks.floating(f"params[{i}]", param)
            _checks.same(f"params[{i}]", param, "params[0]", params[0])
    writable("params", params)


def alike(
    name: str,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    bits: Sequence[Tensor | None] | None = None,
) -> None:
    """Raise unless `tensors` has a tensor of the shape, device and dtype of each parameter.

    Where there are bits, 1-D tensors of fewer elements are those of its free entries.
    """
    listed(name, tensors, len(params))
    if _plain(tensors, params):
        return
    for i, (value, param) in enumerate(zip(tensors, params, strict=True)):
        _checks.tensor(f"{name}[{i}]", value)
        free = bits is not None and bits[i] is not None and value.dim() == 1
        if not (free and value.numel() < param.numel()):
            _checks.shape(f"{name}[{i}]", value, param.shape, f"that of params[{i}]")
        _checks.same(f"{name}[{i}]", value, f"params[{i}]", param)


def state(
    name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], bits: Sequence[Tensor | None]
) -> None:
    """Raise unless `tensors` can be written and are each like its parameter or, compact, 1-D and shorter."""
    alike(name, tensors, params, bits)
    writable(name, tensors)


def compact(state: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether some state is that of free entries alone."""
    return [one.numel() for one in state] != [one.numel() for one in params][: len(state)]


def frozen_bits(
    frozen: Sequence[Tensor | None] | None, params: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return one mask or None for each parameter; raise unless each is the packed bits of its own."""
    if frozen is None:
        return [None] * len(params)
    listed("frozen", frozen, len(params))
    held = [bits for bits in frozen if bits is not None]
    sizes = [
        (packed_bytes(param.numel()),)
        for bits, param in zip(frozen, params, strict=True)
        if bits is not None
    ]
    if not held or _like(held, sizes, torch.uint8, params[0].device):
        return list(frozen)
    for i, (bits, param) in enumerate(zip(frozen, params, strict=True)):
        if bits is not None:
            _checks.packed(f"frozen[{i}]", bits, param.numel(), f"params[{i}]", param)
            _checks.shape(f"frozen[{i}]", bits, bits.shape[-1:], "one mask, not several")
    return list(frozen)


def _plain(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether nothing can be wrong with these tensors and parameters."""
    if not params or False in [isinstance(param, Tensor) for param in params]:
        return False
    shapes, dtype = [param.shape for param in params], params[0].dtype
    return dtype in _checks.FLOATING and _like(tensors, shapes, dtype, params[0].device)


def scalars(tensors: Sequence[Tensor]) -> bool:
    """Whether all are 0-d float32 tensors on the CPU, as an optimizer's counts are."""
    shapes = [()] * len(tensors)
    return _like(tensors, shapes, torch.float32, torch.device("cpu"))


def _like(
    tensors: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether all are dense tensors of these shapes, dtype and device.

    One attribute of all, then the next: for the 62 tensors of ResNet-18 20 us, where a tensor at a time
    with words for its faults takes 150 (AMD EPYC).
    """
    n = len(tensors)
    return (
        False not in [isinstance(tensor, Tensor) for tensor in tensors]
        and [tensor.dtype for tensor in tensors] == [dtype] * n
        and [tensor.device for tensor in tensors] == [device] * n
        and [tensor.layout for tensor in tensors] == [torch.strided] * n
        and [tensor.shape for tensor in tensors] == shapes
    )


def listed(name: str, tensors: object, length: int) -> None:
    """Raise unless `tensors` is a list or tuple of `length` elements."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if len(tensors) != length:
        raise ValueError(
            f"{name}: expected {length} elements, one for each of params, got {len(tensors)}"
        )


def writable(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError where several elements of a tensor share one place in memory."""
    if True not in [0 in tensor.stride() for tensor in tensors]:
        return
    for i, tensor in enumerate(tensors):
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        if any(stride == 0 < size - 1 for size, stride in pairs):
            raise ValueError(
                f"{name}[{i}]: expected a tensor that can be written, got one expanded to "
                f"{tuple(tensor.shape)}"
            )


def number_or_tensor(name: str, value: float | Tensor) -> Tensor:
    """Return a number or a 1-element tensor as a 0-d tensor; a number as float64 on the CPU."""
    if not isinstance(value, Tensor):
        # On the CPU whatever the default device is: elsewhere each step would copy it there and wait.
        return torch.tensor(_checks.finite(name, value), dtype=torch.float64, device="cpu")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a number or a floating tensor of 1 element, got {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )
    return value.detach().reshape(())
