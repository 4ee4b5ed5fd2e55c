"""The naive mask: freeze the weights that stand out."""

from __future__ import annotations

from torch import Tensor

from fastmask.bits import BitMask
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies.found import Found


def find(config: Config, source: Source, part: Part) -> Found:
    """Freeze `w > mean(W) + k std(W)` and `w < mean(W) - k std(W)`; for k = 1, 31.7 % of normal values.

    Args:
        config: `naive_k` is k.
        source: its trained values W (N, K) decide; the standard deviation is torch's, with n - 1.
        part: its training rows, which are not looked at.

    Source: arXiv 2308.13957, 5.1.
    """
    return Found(outliers(source.trained[MASKED], config.naive_k))


def outliers(weight: Tensor, k: float) -> BitMask:
    """What lies strictly more than k standard deviations from the mean."""
    mean, far = weight.mean(), k * weight.std()
    return BitMask.from_bool((weight > mean + far) | (weight < mean - far))
