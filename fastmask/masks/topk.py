"""TopKMask: the largest scores, an exact share of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmask import ops
from fastmask.masks.mask import Init, Off, Scale, ScoreMask
from fastmask.ops import _checks


class TopKMask(ScoreMask):
    """Activate the `floor(density * n + 0.5)` weights with the largest scores, straight-through.

    Training and evaluation use the same bits; in evaluation the scores take no gradient. Among equal
    scores the first weights win, so that a constant start would keep the first rows.

    Args:
        density: share of active weights, in [0, 1].
        off: what an inactive weight is read as: `zero`, or `flip` for its negative.
        scale: `rsqrt_density` divides the weight by the square root of the density, or None.
        init: first scores: `kaiming` (uniform within 1 / sqrt(fan_in)), `magnitude` (|W|) or a number.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.

    Source: Ramanujan et al., CVPR 2020 (edge-popup); arXiv 2409.07577, 4 (progressive top-k).
    """

    scores: nn.Parameter

    def __init__(
        self,
        density: float,
        off: Off = "zero",
        scale: Scale = None,
        *,
        init: Init = "kaiming",
    ) -> None:
        super().__init__(init, off, scale)
        self.target_density = _checks.share("density", density)

    def learned_options(self) -> dict[str, Any]:
        return {
            "method": "topk",
            "density": self.target_density,
            "off": self.off,
            "scale": self.scale,
        }

    def bits_now(self) -> Tensor:
        return ops.topk_mask(self.own_scores(), self.target_density)

    def settings(self) -> dict[str, Any]:
        return {
            "density": self.target_density,
            "off": self.off,
            "scale": self.scale,
            "init": self.init,
        }
