"""What a strategy finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastmask.bits import BitMask


class MaskWarning(UserWarning):
    """A mask came out in a way that its user should know of: empty, full, or its logits at their bound."""


@dataclass(frozen=True, eq=False)
class Found:
    """A mask of the head's last layer, 1 = frozen.

    Attributes:
        frozen: which entries stage 3 may not move.
        scores: what decided them, float32 of the weight's shape: logits, or the edit; None for naive.
        notes: figures for the run's metrics.
    """

    frozen: BitMask
    scores: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)


class RunningMean:
    """Exponential mean of positive numbers that starts at the first: `m = 0.99 m + 0.01 v`."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, new: float) -> float:
        self.value = new if self.value is None else 0.99 * self.value + 0.01 * new
        return self.value
