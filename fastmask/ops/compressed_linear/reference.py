"""Specification of compressed_linear: scatter the kept values over zeros, then a dense product."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastmask.ops._layout import numel_of
from fastmask.ops.popcount.reference import popcount
from fastmask.ops.unpack.reference import unpack


def dense(values: Tensor, active: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of this shape: the next value where a bit is 1, in element order, else 0."""
    ones = unpack(active, numel_of(shape)).view(*shape)
    return values.new_zeros(shape).masked_scatter(ones, values)


def as_many(values: Tensor, ones: int) -> None:
    """Raise ValueError unless there is a value for each 1."""
    if values.numel() != ones:
        raise ValueError(
            f"values: expected {ones} values, one for each 1 of active, got {values.numel()}"
        )


def compressed_linear(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x (B, K) through the weight (N, K) of the kept values, plus bias."""
    if x.device.type == "cpu":  # counting would stall a GPU
        as_many(values, int(popcount(active)))
    return F.linear(x, dense(values, active, (out_features, x.shape[1])), bias)


def grad_input(grad: Tensor, values: Tensor, active: Tensor, in_features: int) -> Tensor:
    """dL/dx = dY W."""
    return grad @ dense(values, active, (grad.shape[1], in_features))
