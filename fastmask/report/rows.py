"""One row of `results.csv`: what a run was and what it scored."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from fastmask.errors import RunFolderError

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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunFolderError(f"{path}: no such file; is this the folder of a run?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from error
    reader = csv.DictReader(text.splitlines())
    given = (*(reader.fieldnames or ()), *_ADDED)
    lacking = [name for name in COLUMNS if name not in given]
    if lacking:
        raise RunFolderError(f"{path}: the header line lacks {', '.join(lacking)}")
    rows: list[Row] = []
    seen: dict[tuple[str, str, str, str, int, str], int] = {}
    try:
        for record in reader:
            row = _row(record, f"{path}, line {reader.line_num}")
            if row.key in seen:
                raise RunFolderError(
                    f"{path}, line {reader.line_num}: the run of line {seen[row.key]} again"
                )
            seen[row.key] = reader.line_num
            rows.append(row)
    except csv.Error as error:
        raise RunFolderError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _row(record: dict[str, str | None], where: str) -> Row:
    lacking = [name for name in COLUMNS if record.get(name, "") is None]
    if lacking:
        raise RunFolderError(f"{where}: cut off before {lacking[0]}")
    text = {name: record.get(name) or "" for name in COLUMNS}
    for name in ("source", "target", "strategy"):
        if not text[name]:
            raise RunFolderError(f"{where}: {name} is empty")
    try:
        seed = int(text["seed"])
    except ValueError as error:
        raise RunFolderError(f"{where}: seed {text['seed']!r} is no whole number") from error
    shares = {name: _share(text[name], name, where) for name in COLUMNS[5:9]}
    return Row(
        text["source"],
        text["target"],
        text["strategy"],
        text["start"],
        seed,
        **shares,
        setting=text["setting"],
    )


def _share(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise RunFolderError(f"{where}: {name} {text!r} is no number") from error
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise RunFolderError(f"{where}: {name} {text} is no share of 1")
    return value
