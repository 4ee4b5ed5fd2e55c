"""The random mask: freeze as many weights as others do, by chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastmask.bits import BitMask
from fastmask.ops.sample_mask.reference import uniform24
from fastmask.transfer.batches import generator
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies.found import Found
from fastmask.transfer.strategies.magnitude import DENSITY, largest


def find(config: Config, source: Source, part: Part) -> Found:
    """Freeze a share of `density` (0.55 for None) drawn without replacement, an exact number.

    One seed and source draw one order, of which a larger density takes more.

    Args:
        config: `density`; with one layer, `scope` makes no difference.
        source: its domain and seed decide; its values are not looked at.
        part: its training rows, which are not looked at.
    """
    share = DENSITY if config.density is None else config.density
    draws = generator(source.seed, "random mask", source.domain)
    return Found(masks({MASKED: source.trained[MASKED]}, share, config.scope, draws)[MASKED])


def masks(
    weights: Mapping[str, Tensor],
    density: float,
    scope: Literal["layer", "global"],
    draws: torch.Generator,
) -> dict[str, BitMask]:
    """The largest of random scores: `largest({name: 24 bits of Philox}, density, scope)`.

    Weight i takes stream i of one seed, so that bits are the same on every device. Under `global` a layer's
    own share is random too.

    Args:
        weights: by name; their values are not looked at.
        density: share of ones, in [0, 1].
        scope: `layer` or `global`: an exact number in each, or in all together.
        draws: decides the seed.
    """
    seed = torch.randint(2**62, (), generator=draws)
    scores = {
        name: uniform24(weight.numel(), seed.to(weight.device), 1, stream)
        .view(weight.shape)
        .float()
        for stream, (name, weight) in enumerate(weights.items())
    }
    return largest(scores, density, scope)
