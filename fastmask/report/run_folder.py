"""A run folder as the report reads it: rows, settings, environment and masks, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmask.errors import MaskFileError, RunFolderError
from fastmask.report import metrics
from fastmask.report.mask_file import MaskFile, open_mask
from fastmask.report.mask_rows import MaskRow, read_mask_rows
from fastmask.report.rows import MASKED, Row, read_rows


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind; `masks` is keyed by (source, strategy, seed).

    `rows` are the runs at the sweep's own settings, `varied` those with a knob varied. `mask_rows` are of
    either; a run of an older version has none.
    """

    path: Path
    rows: tuple[Row, ...]
    varied: tuple[Row, ...]
    mask_rows: tuple[MaskRow, ...]
    config: dict[str, Any]
    environment: dict[str, Any]
    masks: dict[tuple[str, str, int], MaskFile]

    @property
    def planned(self) -> int | None:
        """How many runs the sweep was to have, where its environment says so."""
        said = self.environment.get("planned_runs")
        return said if isinstance(said, int) and said > 0 else None

    def mask(self, source: str, strategy: str) -> MaskFile | None:
        """The mask of the lowest seed; None where the strategy never ran on the source."""
        found = [r.seed for r in self.rows if (r.source, r.strategy) == (source, strategy)]
        if not found:
            return None
        key = (source, strategy, min(found))
        if key not in self.masks:
            raise MaskFileError(
                f"{self.path / 'masks'}: no file holds the {strategy} mask of {source}, "
                f"seed {key[2]}, that results.csv reports "
                f"(expected {source}-{strategy}-seed{key[2]}.safetensors)"
            )
        return self.masks[key]

    def any_mask(self, source: str) -> MaskFile | None:
        """A mask file of the source, whichever strategy ran: all hold the same trained values."""
        for strategy in metrics.strategies(self.rows):
            if strategy in MASKED and (found := self.mask(source, strategy)) is not None:
                return found
        return None


def read_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        RunFolderError: a file is missing, or results.csv, masks.csv, config.json or environment.json is
            damaged.
        MaskFileError: a file under masks/ is damaged.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path}: no such folder")
    found = read_rows(path / "results.csv")
    rows = tuple(row for row in found if not row.setting)
    varied = tuple(row for row in found if row.setting)
    table = path / "masks.csv"
    mask_rows = tuple(read_mask_rows(table)) if table.exists() else ()
    config = _read_object(path / "config.json")
    environment = _read_object(path / "environment.json")
    folder = path / "masks"
    if not folder.is_dir() and any(row.strategy in MASKED for row in rows):
        raise RunFolderError(f"{folder}: no such folder, though results.csv reports masked runs")
    masks = {
        (mask.source, mask.strategy, mask.seed): mask
        for mask in map(open_mask, sorted(folder.glob("*.safetensors")))
    }
    return RunFolder(path, rows, varied, mask_rows, config, environment, masks)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path}: no such file; is this the folder of a run?") from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
