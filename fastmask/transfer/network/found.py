"""What a strategy finds in a network: a mask for each masked layer's weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastmask.bits import BitMask


@dataclass(frozen=True, eq=False)
class FoundMasks:
    """Masks by the parameter's name, 1 = frozen.

    Attributes:
        frozen: which entries stage 3 may not move.
        scores: what decided them, float32 of the weights' shapes; empty where the values alone did.
        notes: figures for the run's metrics.
    """

    frozen: Mapping[str, BitMask]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of all masked entries that is frozen."""
        return sum(m.count() for m in self.frozen.values()) / sum(
            m.numel() for m in self.frozen.values()
        )

    @property
    def positive_share(self) -> float:
        """Share of all scores that is above 0."""
        above = sum(int((own > 0).sum()) for own in self.scores.values())
        return above / sum(own.numel() for own in self.scores.values())
