"""The magnitude mask: freeze the largest weights, of each layer or of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies.found import Found

# What is frozen where no density is asked for.
DENSITY = 0.55


def find(config: Config, source: Source, part: Part) -> Found:
    """Freeze the largest |w|, a share of `density` (0.55 for None).

    Args:
        config: `density`; with one layer, `scope` makes no difference.
        source: its trained values W (N, K) decide.
        part: its training rows, which are not looked at.

    Source: Han et al., NIPS 2015; as `torch.nn.utils.prune.l1_unstructured` keeps.
    """
    share = DENSITY if config.density is None else config.density
    return Found(masks({MASKED: source.trained[MASKED]}, share, config.scope)[MASKED])


def masks(
    weights: Mapping[str, Tensor], density: float, scope: Literal["layer", "global"]
) -> dict[str, BitMask]:
    """The largest |w|: `largest({name: |W|}, density, scope)`."""
    return largest({name: weight.abs() for name, weight in weights.items()}, density, scope)


def largest(
    scores: Mapping[str, Tensor], density: float, scope: Literal["layer", "global"]
) -> dict[str, BitMask]:
    """The k largest scores, `k = floor(density * n + 0.5)`: of each tensor, or of all as one list.

    Where `torch.nn.utils.prune` at `amount = 1 - density` keeps as many, it keeps the same, but for which
    of equal scores: here the first. It prunes `round(amount * n)`, halves to even, so that it keeps one
    fewer where `density * n` lies halfway between two numbers and n less the lower of them is even.

    Args:
        scores: floating tensors by name, n elements each or together; `global`: on one device.
        density: share of ones, in [0, 1].
        scope: `layer` or `global`.

    Returns:
        Masks by name, 1 = among the largest. A NaN ranks with -inf.
    """
    if scope == "layer":
        return {
            name: BitMask(ops.topk_mask(own, density), own.shape) for name, own in scores.items()
        }
    flat = torch.cat([own.flatten() for own in scores.values()])
    ones = ops.unpack(ops.topk_mask(flat, density), flat.shape)
    parts = ones.split([own.numel() for own in scores.values()])
    return {
        name: BitMask.from_bool(part.view(own.shape))
        for part, (name, own) in zip(parts, scores.items(), strict=True)
    }
