"""Specification of masked_linear: select, never multiply, then a dense product for each mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.ops.unpack.reference import unpack


def select(weight: Tensor, active: Tensor) -> Tensor:
    """Weights (S, N, K) with masked-out entries exactly 0, also where they are NaN or infinite."""
    ones = unpack(active, weight.numel()).view(len(active), *weight.shape)
    return torch.where(ones, weight, weight.new_zeros(()))


def rows_of(groups: Tensor | None, samples: int, count: int) -> list[Tensor | slice]:
    """The rows of each mask: equal consecutive groups, or those that name it."""
    if groups is None:
        size = count // samples
        return [slice(s * size, (s + 1) * size) for s in range(samples)]
    return [torch.nonzero(groups == s).squeeze(1) for s in range(samples)]


def linear(x: Tensor, weights: Tensor, bias: Tensor | None, groups: Tensor | None) -> Tensor:
    """Rows of x (B, K) through the weights (S, N, K) of their masks, (B, N)."""
    out = x.new_empty(x.shape[0], weights.shape[1])
    for rows, w in zip(rows_of(groups, len(weights), len(x)), weights, strict=True):
        out[rows] = F.linear(x[rows], w, bias)
    return out


def linear_grad_input(grad: Tensor, weights: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dx (B, K) for the weights (S, N, K) of each row's mask."""
    out = grad.new_empty(grad.shape[0], weights.shape[2])
    for rows, w in zip(rows_of(groups, len(weights), len(grad)), weights, strict=True):
        out[rows] = grad[rows] @ w
    return out


def linear_grad_weights(grad: Tensor, x: Tensor, samples: int, groups: Tensor | None) -> Tensor:
    """dL/dW_s = dY_s^T X_s of each mask's rows, (S, N, K)."""
    parts = rows_of(groups, samples, len(x))
    return torch.stack([grad[rows].T @ x[rows] for rows in parts])


def masked_linear(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias."""
    return linear(x, select(weight, active), bias, groups)


def grad_input(grad: Tensor, weight: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dx = dY where(active, W, 0)."""
    return linear_grad_input(grad, select(weight, active), groups)


def grad_weight(grad: Tensor, x: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dY_s^T X_s, 0)."""
    dense = linear_grad_weights(grad, x, len(active), groups)
    ones = unpack(active, dense[0].numel()).view_as(dense)
    return torch.where(ones, dense, dense.new_zeros(())).sum(dim=0)
