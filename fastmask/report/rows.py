"""One row of `results.csv`: what a run was and what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastmask.report import csv_table

COLUMNS = (
    "source",
    "target",
    "strategy",
    "start",
    "seed",
    "frozen_density",
    "source_accuracy",
    "target_accuracy",
    "source_accuracy_before",
    "setting",
)
# Columns that later versions added: a table without them is read as if they were empty.
_ADDED = ("setting",)
MASKED = ("naive", "editor", "binary", "kl", "lowrank", "magnitude", "random")
STRATEGIES = ("none", *MASKED, "scratch")
STARTS = ("source-start", "source-end", "random")


@dataclass(frozen=True)
class Row:
    """A finished run; accuracies and `frozen_density` are shares of 1.

    `setting` is the knob that was varied, such as `beta=0.3`, and "" for the sweep's own settings.
    """

    source: str
    target: str
    strategy: str
    start: str
    seed: int
    frozen_density: float
    source_accuracy: float
    target_accuracy: float
    source_accuracy_before: float
    setting: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What makes a run one of its own in a sweep."""
        return self.source, self.target, self.strategy, self.start, self.seed, self.setting


def read_rows(path: Path) -> list[Row]:
    """Read `results.csv`; a line that cannot be a run raises RunFolderError with its number."""
    return csv_table.read(path, COLUMNS, _row, lambda row: row.key, "run", _ADDED)


def _row(cells: Mapping[str, str], where: str) -> Row:
    csv_table.filled(cells, ("source", "target", "strategy"), where)
    return Row(
        cells["source"],
        cells["target"],
        cells["strategy"],
        cells["start"],
        csv_table.whole(cells, "seed", where),
        csv_table.share(cells, "frozen_density", where),
        csv_table.share(cells, "source_accuracy", where),
        csv_table.share(cells, "target_accuracy", where),
        csv_table.share(cells, "source_accuracy_before", where),
        csv_table.setting(cells, where),
    )
