"""ThresholdMask: active where the score lies above a threshold."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmask import ops
from fastmask.masks.mask import Init, Off, Scale, ScoreMask
from fastmask.ops import _checks


class ThresholdMask(ScoreMask):
    """Activate the weights whose score exceeds mu: `active = scores > mu`, straight-through.

    Training and evaluation use the same bits; in evaluation the scores take no gradient.

    Args:
        init: first score of every weight, `kaiming` (uniform within 1 / sqrt(fan_in)) or `magnitude` (|W|).
        mu: threshold; a score equal to it is inactive.
        off: what an inactive weight is read as: `zero`, or `flip` for its negative.
        scale: `rsqrt_density` divides the weight by the square root of the density, or None.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.

    Source: arXiv 2409.07577, Eq. 1 (with `scale="rsqrt_density"`); Mallya et al., ECCV 2018 (Piggyback).
    """

    scores: nn.Parameter

    def __init__(
        self,
        init: Init = 1.0,
        mu: float = 0.0,
        off: Off = "zero",
        scale: Scale = None,
    ) -> None:
        super().__init__(init, off, scale)
        self.mu = _checks.finite("mu", mu)

    def learned_options(self) -> dict[str, Any]:
        return {"method": "threshold", "mu": self.mu, "off": self.off, "scale": self.scale}

    def bits_now(self) -> Tensor:
        return ops.pack(self.own_scores(), self.mu)

    def settings(self) -> dict[str, Any]:
        return {"init": self.init, "mu": self.mu, "off": self.off, "scale": self.scale}
