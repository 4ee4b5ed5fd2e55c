"""popcount: the number of ones of packed masks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._register import register


def popcount(bits: Tensor, *, backend: str = "auto") -> Tensor:
    """Count the ones of each packed mask: `unpack(bits).sum()`, without unpacking.

    Args:
        bits: packed masks, uint8 (bytes,) or (S, bytes).
        backend: `auto` or the name of a back end.

    Returns:
        int64 tensor, 0-d or (S,), on the device of `bits` (no transfer to the host).

    Raises:
        TypeError: `bits` is not uint8.
        ValueError: `bits` is not of one or two dimensions.

    Gradients: none. Deterministic: yes.
    """
    _checks.tensor("bits", bits)
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits: expected dtype torch.uint8, got {bits.dtype}")
    if bits.dim() not in (1, 2):
        raise ValueError(f"bits: expected shape (bytes,) or (S, bytes), got {tuple(bits.shape)}")
    return torch.ops.fastmask.popcount(bits, backend)


def _implementation(bits: Tensor, backend: str) -> Tensor:
    return _backend.resolve("popcount", backend, bits.device).popcount(bits)


def _fake(bits: Tensor, backend: str) -> Tensor:
    return bits.new_empty(bits.shape[:-1], dtype=torch.int64)


register("popcount(Tensor bits, str backend) -> Tensor", _implementation, _fake)
