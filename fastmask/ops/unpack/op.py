"""unpack: packed bits as a bool tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._layout import numel_of, packed_bytes
from fastmask.ops._register import register


def unpack(bits: Tensor, shape: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Unpack bits into bools: `out.flatten()[e] = byte[e // 8] >> (e % 8) & 1`.

    Args:
        bits: packed masks, uint8 (bytes,) or (S, bytes), of tensors of shape `shape`.
        shape: logical shape of the masked tensor.
        backend: `auto` or the name of a back end.

    Returns:
        bool tensor of shape `shape`, or `(S, *shape)`.

    Raises:
        TypeError: `bits` is not uint8.
        ValueError: the number of bytes is not that of `shape`.

    Gradients: none. Deterministic: yes.
    """
    _checks.tensor("bits", bits)
    numel = numel_of(shape)
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits: expected dtype torch.uint8, got {bits.dtype}")
    if bits.dim() not in (1, 2) or bits.shape[-1] != packed_bytes(numel):
        raise ValueError(
            f"bits: expected ({packed_bytes(numel)},) or (S, {packed_bytes(numel)}) bytes for shape "
            f"{tuple(shape)}, got {tuple(bits.shape)}"
        )
    return torch.ops.fastmask.unpack(bits, numel, backend).view((*bits.shape[:-1], *shape))


def _implementation(bits: Tensor, numel: int, backend: str) -> Tensor:
    return _backend.resolve("unpack", backend, bits.device).unpack(bits, numel)


def _fake(bits: Tensor, numel: int, backend: str) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], numel), dtype=torch.bool)


register("unpack(Tensor bits, SymInt numel, str backend) -> Tensor", _implementation, _fake)
