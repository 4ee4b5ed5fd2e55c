"""One row of `masks.csv`: how dense a mask is, and how much of its source it holds alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastmask.report import csv_table

MASK_COLUMNS = (
    "source",
    "strategy",
    "seed",
    "setting",
    "frozen_density",
    "positive_share",
    "source_accuracy",
    "kept_accuracy",
    "inverted_accuracy",
)


@dataclass(frozen=True)
class MaskRow:
    """A finished mask; all figures are shares of 1, accuracies those of the source's test split.

    `setting` is the knob that was varied, such as `beta=0.3`, and "" for the sweep's own settings.
    `positive_share` is that of logits above 0, None where a strategy learns no logits. With B the frozen
    bits, `source_accuracy` is under the trained W, `kept_accuracy` under `W * B` and `inverted_accuracy`
    under `W * (1 - B)`.
    """

    source: str
    strategy: str
    seed: int
    setting: str
    frozen_density: float
    positive_share: float | None
    source_accuracy: float
    kept_accuracy: float
    inverted_accuracy: float

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes a mask one of its own in a sweep."""
        return self.source, self.strategy, self.seed, self.setting


def read_mask_rows(path: Path) -> list[MaskRow]:
    """Read `masks.csv`; a line that cannot be a mask raises RunFolderError with its number."""
    return csv_table.read(path, MASK_COLUMNS, _row, lambda row: row.key, "mask")


def _row(cells: Mapping[str, str], where: str) -> MaskRow:
    csv_table.filled(cells, ("source", "strategy"), where)
    return MaskRow(
        cells["source"],
        cells["strategy"],
        csv_table.whole(cells, "seed", where),
        csv_table.setting(cells, where),
        csv_table.share(cells, "frozen_density", where),
        csv_table.share(cells, "positive_share", where) if cells["positive_share"] else None,
        csv_table.share(cells, "source_accuracy", where),
        csv_table.share(cells, "kept_accuracy", where),
        csv_table.share(cells, "inverted_accuracy", where),
    )
