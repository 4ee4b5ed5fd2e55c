"""The naive mask: freeze the weights that stand out."""

from __future__ import annotations

from torch import Tensor

from fastmask.bits import BitMask
from fastmask.transfer.strategies.found import Found


def find(weight: Tensor) -> Found:
    """Freeze `w > mean(W) + std(W)` and `w < mean(W) - std(W)`; of normal values, 31.7 %.

    Args:
        weight: source-trained values (N, K). The standard deviation is torch's, with n - 1.

    Source: arXiv 2308.13957, 5.1.
    """
    mean, std = weight.mean(), weight.std()
    return Found(BitMask.from_bool((weight > mean + std) | (weight < mean - std)))
