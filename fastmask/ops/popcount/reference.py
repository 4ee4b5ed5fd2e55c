"""Specification of popcount: the number of ones, by halving sums within each byte."""

from __future__ import annotations

import torch
from torch import Tensor


def popcount(bits: Tensor) -> Tensor:
    """Ones of each packed mask (..., bytes), int64 (...)."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    ones = (nibbles + (nibbles >> 4)) & 0x0F
    return ones.sum(dim=-1, dtype=torch.int64)
