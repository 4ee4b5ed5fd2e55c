"""The run folder as a sweep fills it: claimed before any work, complete up to the last finished run."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, TextIO

import torch

from fastmask import __version__
from fastmask.errors import RunFolderError
from fastmask.report import Row, atomic
from fastmask.report.rows import COLUMNS
from fastmask.transfer import mask_files
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import Found


class Recorder:
    """Write a run folder as the sweep goes.

    Args:
        config: its settings; `out` is the folder, which must be new or empty.

    Raises:
        RunFolderError: the folder holds something, or cannot be written to.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.out).expanduser()
        self._config = config
        self._made = not self.folder.exists()
        self._files: list[TextIO] = []
        self._began = time.monotonic()
        self.rows: list[Row] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = sorted(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise RunFolderError(f"out: {self.folder} cannot be written to ({error})") from error
        if held:
            raise RunFolderError(
                f"out: {self.folder} already holds {', '.join(held[:4])}"
                f"{' ...' if len(held) > 4 else ''}; name a folder that is new or empty, or move it away"
            )
        try:
            # "x": of two sweeps that claim one folder at once, one is refused.
            with (self.folder / "config.json").open("x", encoding="utf-8") as file:
                file.write(config.to_json())
            self._metrics = self._open("metrics.jsonl")
            self._results = self._open("results.csv")
            self._table = csv.writer(self._results, lineterminator="\n")
            self._table.writerow(COLUMNS)
            self._results.flush()
            (self.folder / "masks").mkdir()
        except OSError as error:
            self.close()
            raise RunFolderError(f"out: {self.folder} cannot be written to ({error})") from error

    def environment(self, said: Mapping[str, Any]) -> None:
        """Write environment.json."""
        content = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
        atomic.write(self.folder / "environment.json", content.encode())

    def metric(self, event: str, **said: Any) -> None:
        """Append a line to metrics.jsonl: the event, seconds since the folder was claimed, its figures."""
        line = {"event": event, "seconds": round(time.monotonic() - self._began, 3), **said}
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunFolderError(f"{self._metrics.name}: cannot be written ({error})") from error

    def mask(
        self,
        source: Source,
        strategy: str,
        setting: str,
        found: Found,
        classes: tuple[str, ...],
    ) -> None:
        """Write a mask's figures, and at the sweep's own settings its file."""
        said = {
            "strategy": strategy,
            "setting": setting,
            "source": source.domain,
            "seed": source.seed,
        }
        self.metric("mask", **said, frozen_density=found.frozen.density, **found.notes)
        if setting:
            return
        mask_files.write(
            self.folder / "masks" / mask_files.name(source.domain, strategy, source.seed),
            source,
            strategy,
            found,
            classes,
            exact_recall=self._config.exact_recall,
            train_unmasked=self._config.train_unmasked,
        )

    def row(self, row: Row, loss: float) -> None:
        """Append a finished run to results.csv, on the disk before this returns."""
        try:
            self._table.writerow(astuple(row))
            self._results.flush()
            os.fsync(self._results.fileno())
        except OSError as error:
            raise RunFolderError(f"{self._results.name}: cannot be written ({error})") from error
        self.rows.append(row)
        said = dict(zip(COLUMNS, astuple(row), strict=True))
        self.metric("run", **said, loss=loss)

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Take away what was written, so that the folder can be used again; for a sweep that never began."""
        self.close()
        for file_name in ("config.json", "metrics.jsonl", "results.csv", "environment.json"):
            (self.folder / file_name).unlink(missing_ok=True)
        (self.folder / "masks").rmdir()
        if self._made:
            self.folder.rmdir()

    def _open(self, file_name: str) -> TextIO:
        file = (self.folder / file_name).open("x", encoding="utf-8", newline="")
        self._files.append(file)
        return file


def describe(
    config: Config,
    domains: Mapping[str, Domain],
    classes: tuple[str, ...],
    planned_runs: int,
    of_data: Mapping[str, str],
) -> dict[str, Any]:
    """What environment.json says: versions, machine, data, policies, and how the run was started."""
    tested = "held out of the training part" if config.holdout else "test part"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "planned_runs": planned_runs,
        "seeds": list(config.seed_range),
        **of_data,
        "rows": {
            name: {"train": len(domain.train.y), "test": len(domain.test.y)}
            for name, domain in domains.items()
        },
        "tested_on": tested,
        "classes": list(classes),
        "features": next(iter(domains.values())).train.x.shape[1],
        "batch_norm": "frozen: features are of a backbone in eval mode, its statistics never move",
        "device": config.device,
        "threads": {"features": torch.get_num_threads(), "heads": 1},
        "fastmask": __version__,
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "safetensors": importlib.metadata.version("safetensors"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
