"""The run folder as a sweep fills it: claimed before any work, complete up to the last finished run."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from fastmask import __version__
from fastmask.errors import RunFolderError
from fastmask.report import Row, atomic
from fastmask.report.mask_rows import MASK_COLUMNS, MaskRow, read_mask_rows
from fastmask.report.rows import COLUMNS, read_rows
from fastmask.transfer import mask_files
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain
from fastmask.transfer.plan import Group, Kind

# What a sweep that goes on must find as it was; the rest of environment.json says how it was run.
_RESTS_ON = (
    "data",
    "data_fingerprint",
    "backbone",
    "backbone_fingerprint",
    "rows",
    "tested_on",
    "classes",
    "features",
)


class Recorder:
    """Write a run folder as the sweep goes, or go on with one that was left unfinished.

    While it is open no other sweep can use the folder. What it says is written is on the disk: rows of a
    group in one write, a mask's file before its line in masks.csv.

    Args:
        config: its settings; `out` is the folder.
        resume: go on with the folder of an interrupted sweep of the same settings; otherwise the folder
            must be new or empty.

    Attributes:
        rows: finished runs, those of before included.
        masks: figures of finished masks, likewise.

    Raises:
        RunFolderError: the folder holds something, or with `resume` no sweep of these settings; another
            sweep is using it; it cannot be read or written to.
    """

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.folder = Path(config.out).expanduser()
        self._config = config
        self._made = not resume and not self.folder.exists()
        self._resumed = resume
        self._files: list[TextIO] = []
        self._began = time.monotonic()
        self.rows: list[Row] = []
        self.masks: list[MaskRow] = []
        try:
            (self._reopen if resume else self._claim)()
        except OSError as error:
            self.close()
            raise RunFolderError(f"out: {self.folder} cannot be written to ({error})") from error
        except BaseException:
            self.close()
            raise

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in self.folder.iterdir())
        if held:
            again = "config.json" in held and "results.csv" in held
            raise RunFolderError(
                f"out: {self.folder} already holds {', '.join(held[:4])}"
                f"{' ...' if len(held) > 4 else ''}; name a folder that is new or empty, or move it away"
                + ("; an interrupted sweep is gone on with by resume" if again else "")
            )
        # "x": of two sweeps that claim one folder at once, one is refused.
        config = self._open("config.json", "x")
        self._lock(config)
        config.write(self._config.to_json())
        config.flush()
        os.fsync(config.fileno())
        self._metrics = self._open("metrics.jsonl", "x")
        self._results = self._open("results.csv", "x")
        self._mask_table = self._open("masks.csv", "x")
        _write(self._results, [COLUMNS])
        _write(self._mask_table, [MASK_COLUMNS])
        (self.folder / "masks").mkdir()

    def _reopen(self) -> None:
        try:
            config = self._open("config.json", "r+")
        except FileNotFoundError:
            raise RunFolderError(
                f"resume: {self.folder} is no folder of a sweep: it has no config.json"
            ) from None
        self._lock(config)
        try:
            said = Config.from_json(config.read())
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"{config.name}: cannot be used ({error})") from error
        _same("settings", asdict(said), asdict(self._config), besides=("out", "cache", "device"))
        for file_name in ("metrics.jsonl", "results.csv", "masks.csv"):
            _whole_lines(self.folder / file_name)
        self._metrics = self._open("metrics.jsonl", "a")
        self._results = self._open("results.csv", "a")
        self._mask_table = self._open("masks.csv", "a")
        for file, columns in ((self._results, COLUMNS), (self._mask_table, MASK_COLUMNS)):
            if os.fstat(file.fileno()).st_size == 0:
                _write(file, [columns])
        self.rows = read_rows(self.folder / "results.csv")
        self.masks = read_mask_rows(self.folder / "masks.csv")
        (self.folder / "masks").mkdir(exist_ok=True)
        self.metric("resumed", runs=len(self.rows))

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Give the folder back where what a sweep needs turns out to be unusable."""
        try:
            yield
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def running(self, planned: int) -> Iterator[None]:
        """Say how a sweep of `planned` runs ended, and close the files.

        Raises:
            KeyboardInterrupt: after Ctrl-C; says what is kept.
        """
        try:
            yield
            self.metric("finished", runs=len(self.rows))
        except KeyboardInterrupt:
            self.metric("interrupted", runs=len(self.rows))
            kept = f"{len(self.rows)} of {planned} runs are kept in {self.folder}"
            raise KeyboardInterrupt(kept) from None
        except Exception as error:
            self.metric("failed", error=f"{type(error).__name__}: {error}", runs=len(self.rows))
            raise
        finally:
            self.close()

    def environment(self, said: Mapping[str, Any]) -> None:
        """Write environment.json; of a sweep that goes on, see that what it rests on is the same.

        Raises:
            RunFolderError: data, splits, classes or backbone are others than before.
        """
        path = self.folder / "environment.json"
        if self._resumed and path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RunFolderError(f"{path}: cannot be read ({error})") from error
            now = json.loads(json.dumps(said))
            for key in _RESTS_ON:
                _same("what the sweep rests on", {key: before.get(key)}, {key: now.get(key)})
            return
        content = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
        atomic.write(path, content.encode())

    def metric(self, event: str, **said: Any) -> None:
        """Append a line to metrics.jsonl: the event, seconds since the folder was opened, its figures."""
        line = {"event": event, "seconds": round(time.monotonic() - self._began, 3), **said}
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunFolderError(f"{self._metrics.name}: cannot be written ({error})") from error

    def mask(self, row: MaskRow, notes: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Write a mask: its file where it is of the sweep's own settings, its line, its figures.

        Args:
            row: what masks.csv says of it.
            notes: what else metrics.jsonl says of it.
            write: writes its file to the path given.
        """
        if not row.setting:
            write(self.folder / "masks" / mask_files.name(row.source, row.strategy, row.seed))
        _write(self._mask_table, [_cells(row)])
        self.masks.append(row)
        self.metric("mask", **asdict(row), **notes)

    def finished(self, rows: Sequence[tuple[Row, float]]) -> None:
        """Append finished runs, each with its loss, to results.csv, on the disk before this returns."""
        _write(self._results, [_cells(row) for row, _ in rows])
        for row, loss in rows:
            self.rows.append(row)
            self.metric("run", **asdict(row), loss=loss)

    @property
    def found(self) -> set[tuple[str, int, Kind]]:
        """Source, seed and kind of every mask in masks.csv."""
        return {(row.source, row.seed, (row.strategy, row.setting)) for row in self.masks}

    def needed(self, groups: Sequence[Group], kinds: Sequence[Kind]) -> list[tuple[str, int]]:
        """The sources and seeds, in the order of the plan, that an unfinished run or a missing mask needs."""
        rows, found = {row.key for row in self.rows}, self.found
        every = [run for group in groups for run in group.runs]
        waiting = {(run.source, run.seed) for run in every if run.key not in rows}
        return [
            key
            for key in dict.fromkeys((run.source, run.seed) for run in every)
            if key in waiting or any((*key, kind) not in found for kind in kinds)
        ]

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Take away what was written, so that the folder can be used again; for a sweep that never began."""
        self.close()
        if self._resumed:
            return
        for file_name in (
            "config.json", "metrics.jsonl", "results.csv", "masks.csv", "environment.json",
        ):  # fmt: skip
            (self.folder / file_name).unlink(missing_ok=True)
        (self.folder / "masks").rmdir()
        if self._made:
            self.folder.rmdir()

    def _open(self, file_name: str, mode: str) -> TextIO:
        file = cast(TextIO, (self.folder / file_name).open(mode, encoding="utf-8", newline=""))
        self._files.append(file)
        return file

    def _lock(self, file: TextIO) -> None:
        """Hold the folder until the file is closed, or the process is gone however it ends."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"out: another sweep is running in {self.folder}") from None


def _write(file: TextIO, lines: Sequence[Sequence[Any]]) -> None:
    """Append lines of a table in one write, on the disk before this returns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    try:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise RunFolderError(f"{file.name}: cannot be written ({error})") from error


def _cells(row: Row | MaskRow) -> tuple[Any, ...]:
    return tuple("" if value is None else value for value in astuple(row))


def _whole_lines(path: Path) -> None:
    """Cut off a last line that was never finished; make the file where there is none."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _same(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], besides: tuple[str, ...] = ()
) -> None:
    for name, value in before.items():
        if name not in besides and now[name] != value:
            raise RunFolderError(
                f"resume: {what} differ: {name} was {value!r} and is {now[name]!r}; a sweep goes on "
                "as it began, or in a new folder"
            )


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
