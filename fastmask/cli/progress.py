"""Progress with the time left: bars on a terminal, seldom a line where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SHOWN = 8
_SECONDS = 10.0


class Meter(Protocol):
    """What a long computation calls with (label, done, total)."""

    def __call__(self, label: str, done: int, total: int) -> None: ...

    def __enter__(self) -> Meter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def meter(console: Console, quiet: bool) -> Meter:
    """The meter that suits the stream: none, bars, or lines."""
    if quiet:
        return Silence()
    return Bars(console) if console.is_terminal else Lines(console)


class Silence:
    """Say nothing."""

    def __call__(self, label: str, done: int, total: int) -> None:
        pass

    def __enter__(self) -> Silence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Bars:
    """A bar a label; of the finished ones the latest stay."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
            for old in list(self._tasks)[:-_SHOWN]:
                self._progress.remove_task(self._tasks.pop(old))
        self._progress.update(self._tasks[label], completed=done, total=total)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Lines:
    """A line when a label begins and ends, and every ten seconds between."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._over: set[str] = set()

    def __call__(self, label: str, done: int, total: int) -> None:
        now = self._clock()
        began = self._began.setdefault(label, now)
        if label in self._over:
            return
        if done >= total:
            self._over.add(label)
            self._print(f"{label}: {done}/{total} done in {duration(now - began)}")
        elif label not in self._said or now - self._said[label] >= _SECONDS:
            self._said[label] = now
            left = ""
            if done and now > began:
                left = f", {duration((now - began) / done * (total - done))} left"
            self._print(f"{label}: {done}/{total}{left}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def duration(seconds: float) -> str:
    """`7 s`, `2 min 05 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
