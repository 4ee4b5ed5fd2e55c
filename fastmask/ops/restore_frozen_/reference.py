"""Specification of restore_frozen_: select, never multiply, so that NaN and -0.0 come back as they were."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.unpack.reference import unpack


def as_bools(bits: Tensor, like: Tensor) -> Tensor:
    """One mask as bools of a tensor's shape."""
    return unpack(bits, like.numel()).view(like.shape)


def put_back(tensor: Tensor, ones: Tensor, old: Tensor) -> None:
    """Write where(ones, old, tensor) into `tensor`."""
    tensor.copy_(torch.where(ones, old, tensor))


def restore_frozen_(params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None]) -> None:
    """theta = saved where frozen."""
    for param, old, bits in zip(params, saved, frozen, strict=True):
        if bits is not None:
            put_back(param, as_bools(bits, param), old)
