"""Specification of restore_frozen_: select, never multiply, so that NaN and -0.0 come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask.ops.unpack.reference import unpack


def as_bools(bits: Tensor, like: Tensor) -> Tensor:
    """One mask as bools of a tensor's shape."""
    return unpack(bits, like.numel()).view(like.shape)


def put_back(tensor: Tensor, ones: Tensor, old: Tensor) -> None:
    """Write where(ones, old, tensor) into `tensor`."""
    tensor.copy_(torch.where(ones, old, tensor))


@contextlib.contextmanager
def dense_state(
    state: list[Tensor], params: list[Tensor], frozen: list[Tensor | None]
) -> Iterator[list[Tensor]]:
    """State of each parameter's shape: compact state, 1-D, is laid out, 0 where frozen, and taken back."""
    dense = list(state)
    free = {}
    for i, (one, param) in enumerate(zip(state, params[: len(state)], strict=True)):
        bits = frozen[i]
        if one.numel() != param.numel() and bits is not None:
            free[i] = ~as_bools(bits, param)
            if (count := int(free[i].sum())) != one.numel():
                raise ValueError(
                    f"state of params[{i}]: expected its {count} free entries, got {one.numel()}"
                )
            dense[i] = one.new_zeros(param.shape).masked_scatter_(free[i], one)
    yield dense
    for i, ones in free.items():
        state[i].copy_(dense[i][ones])


def restore_frozen_(params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None]) -> None:
    """theta = saved where frozen."""
    for param, old, bits in zip(params, saved, frozen, strict=True):
        if bits is not None:
            put_back(param, as_bools(bits, param), old)
