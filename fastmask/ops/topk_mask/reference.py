"""Specification of topk_mask: exactly k ones at the largest scores, the lower index first among equals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask.ops.pack.reference import pack


def kept(numel: int, density: float) -> int:
    """Number of ones: k = floor(density * n + 0.5)."""
    return math.floor(density * numel + 0.5)


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """Packed bits (bytes,) of the k largest scores; NaN ranks with -inf."""
    flat = scores.reshape(-1)
    ranked = torch.where(flat.isnan(), -math.inf, flat)
    order = torch.sort(ranked, descending=True, stable=True).indices
    ones = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    ones[order[: kept(flat.numel(), density)]] = True
    return pack(ones, 0.0)
