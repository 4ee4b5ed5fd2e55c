"""Tables of a run folder, line by line: what cannot be used is named with its file and line."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fastmask.errors import RunFolderError

T = TypeVar("T")


def read(
    path: Path,
    columns: Sequence[str],
    make: Callable[[Mapping[str, str], str], T],
    key: Callable[[T], Hashable],
    what: str,
    added: Sequence[str] = (),
) -> list[T]:
    """Read a table: `make(cells, where)` builds a line's value, no two of which may have one key.

    `what` is what a line holds; columns that are `added` may be missing, and are then empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunFolderError(f"{path}: no such file; is this the folder of a run?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from error
    reader = csv.DictReader(text.splitlines())
    given = (*(reader.fieldnames or ()), *added)
    lacking = [name for name in columns if name not in given]
    if lacking:
        raise RunFolderError(f"{path}: the header line lacks {', '.join(lacking)}")
    found: list[T] = []
    seen: dict[Hashable, int] = {}
    try:
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            short = [name for name in columns if record.get(name, "") is None]
            if short:
                raise RunFolderError(f"{where}: cut off before {short[0]}")
            value = make({name: record.get(name) or "" for name in columns}, where)
            if (own := key(value)) in seen:
                raise RunFolderError(f"{where}: the {what} of line {seen[own]} again")
            seen[own] = reader.line_num
            found.append(value)
    except csv.Error as error:
        raise RunFolderError(f"{path}, line {reader.line_num}: {error}") from error
    return found


def filled(cells: Mapping[str, str], names: Sequence[str], where: str) -> None:
    """Refuse a line in which one of `names` is empty."""
    for name in names:
        if not cells[name]:
            raise RunFolderError(f"{where}: {name} is empty")


def whole(cells: Mapping[str, str], name: str, where: str) -> int:
    """A whole number."""
    try:
        return int(cells[name])
    except ValueError as error:
        raise RunFolderError(f"{where}: {name} {cells[name]!r} is no whole number") from error


def share(cells: Mapping[str, str], name: str, where: str) -> float:
    """A share of 1."""
    try:
        value = float(cells[name])
    except ValueError as error:
        raise RunFolderError(f"{where}: {name} {cells[name]!r} is no number") from error
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise RunFolderError(f"{where}: {name} {cells[name]} is no share of 1")
    return value


def setting(cells: Mapping[str, str], where: str) -> str:
    """A varied knob, `NAME=NUMBER`, or nothing."""
    text = cells["setting"]
    name, equals, value = text.partition("=")
    try:
        usable = not text or bool(name and equals and math.isfinite(float(value)))
    except ValueError:
        usable = False
    if not usable:
        raise RunFolderError(f"{where}: setting {text!r} is not of the form NAME=NUMBER")
    return text
