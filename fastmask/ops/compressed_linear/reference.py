"""Specification of compressed_linear: scatter the kept values over zeros, then a dense product."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastmask.ops._layout import numel_of
from fastmask.ops.unpack.reference import unpack


def dense(values: Tensor, active: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of this shape: the next value where a bit is 1, in element order, else 0."""
    ones = unpack(active, numel_of(shape)).view(*shape)
    return values.new_zeros(shape).masked_scatter(ones, values)


def compressed_linear(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x (B, K) through the weight (N, K) of the kept values, plus bias."""
    return F.linear(x, dense(values, active, (out_features, x.shape[1])), bias)


def grad_input(grad: Tensor, values: Tensor, active: Tensor, in_features: int) -> Tensor:
    """dL/dx = dY W."""
    return grad @ dense(values, active, (grad.shape[1], in_features))
