"""Published splits: the lists that come with PACS and DomainNet."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmask.data.domain_set import raise_faults
from fastmask.errors import DataError

_LINE = re.compile(r"^(?P<path>.+?)\s+(?P<label>\d+)$")
PARTS = ("train", "crossval", "test")


@dataclass(frozen=True)
class Entry:
    """A line of a list: where it stands, the picture's path, its label."""

    place: str
    path: str
    label: int


@dataclass(frozen=True, eq=False)
class Lists:
    """What lists say: the parts of each domain, what does not fit, and which rows are left out and why."""

    sides: dict[str, tuple[Tensor, Tensor]]
    faults: list[str]
    unlisted: dict[str, list[int]]
    copies: dict[str, list[int]]


def read(
    folder: Path,
    names: Mapping[str, Sequence[str]],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read `<domain>_{train,crossval,test}_kfold.txt` (PACS) or `<domain>_{train,test}.txt` (DomainNet).

    A line is `domain/class/file label`. Labels may count from 0 or from 1; each must stand for one class
    folder throughout. PACS's test list is the whole domain, for models that never saw it: where the test list
    contains the training list, the crossval list is the test part. Where the two are disjoint, crossval
    belongs to training.

    Args:
        folder: that holds the lists.
        names: domain -> `domain/class/file` of each row.
        groups: domain -> digest of each row's file; a test picture whose copy is trained on is left out.

    Returns:
        domain -> (training rows, test rows).

    Raises:
        DataError: a list is missing or empty, a line is no `path label`, a file is not there, labels and
            class folders disagree.

    Warns:
        UserWarning: pictures that stand in no list, or copies, are left out.
    """
    found = examine(folder, names, groups)
    raise_faults(f"splits {folder}", found.faults)
    for domain in names:
        _say(domain, len(found.unlisted[domain]), "in no list")
        _say(domain, len(found.copies[domain]), "in the test list with a copy in the training list")
    return found.sides


def examine(
    folder: Path,
    names: Mapping[str, Sequence[str]],
    groups: Mapping[str, Sequence[str]],
) -> Lists:
    """What `read` reads, with all faults listed; of a domain whose lists are missing nothing is said."""
    if not folder.is_dir():
        raise DataError(f"splits: there is no such folder: {folder}")
    faults: list[str] = []
    lists = {domain: _lists(folder, domain, faults) for domain in names}
    _check_labels([e for parts in lists.values() for part in parts.values() for e in part], faults)
    found = Lists({}, faults, {}, {})
    for domain, parts in lists.items():
        if not {"train", "test"} <= set(parts):
            continue
        index = {name: row for row, name in enumerate(names[domain])}
        rows = {part: _rows(entries, index, faults) for part, entries in parts.items()}
        train, test = _sides(domain, rows, faults)
        trained = {groups[domain][row] for row in train}
        copies = {row for row in test if groups[domain][row] in trained}
        found.unlisted[domain] = sorted(set(range(len(names[domain]))) - train - test)
        found.copies[domain] = sorted(copies)
        found.sides[domain] = (
            torch.tensor(sorted(train), dtype=torch.int64),
            torch.tensor(sorted(test - copies), dtype=torch.int64),
        )
    return found


def _say(domain: str, n: int, where: str) -> None:
    if n:
        pictures = "1 picture stands" if n == 1 else f"{n} pictures stand"
        warnings.warn(f"{domain}: {pictures} {where}; left out", stacklevel=4)


def _lists(folder: Path, domain: str, faults: list[str]) -> dict[str, list[Entry]]:
    parts: dict[str, list[Entry]] = {}
    for part in PARTS:
        named = [folder / f"{domain}_{part}{ending}.txt" for ending in ("_kfold", "")]
        path = next((p for p in named if p.is_file()), None)
        if path is None:
            if part != "crossval":
                faults.append(f"{domain}: no {named[0].name} and no {named[1].name}")
            continue
        parts[part] = _entries(path, faults)
    return parts


def _entries(path: Path, faults: list[str]) -> list[Entry]:
    entries: list[Entry] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or error
        faults.append(f"{path.name}: cannot be read ({said})")
        return entries
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.match(line.strip())
        if match is None:
            faults.append(
                f"{path.name}:{number}: expected 'domain/class/file label', got {line[:80]!r}"
            )
            continue
        entries.append(
            Entry(f"{path.name}:{number}", match["path"].replace("\\", "/"), int(match["label"]))
        )
    if not entries:
        faults.append(f"{path.name}: the list is empty")
    return entries


def _check_labels(entries: list[Entry], faults: list[str]) -> None:
    """Each label must stand for one class folder, and each folder for one label, counting from 0 or 1."""
    named: dict[int, tuple[str, str]] = {}
    numbered: dict[str, int] = {}
    for entry in entries:
        folder = _class_of(entry)
        if folder is None:
            faults.append(f"{entry.place}: expected a path domain/class/file, got {entry.path!r}")
            continue
        name, place = named.setdefault(entry.label, (folder, entry.place))
        if name != folder:
            faults.append(
                f"{entry.place}: label {entry.label} stands for {folder}, but for {name} in {place}"
            )
        elif numbered.setdefault(folder, entry.label) != entry.label:
            faults.append(
                f"{entry.place}: {folder} has label {entry.label}, but {numbered[folder]} elsewhere"
            )
    base = min(named, default=0)
    if named and (base > 1 or sorted(named) != list(range(base, base + len(named)))):
        faults.append(
            f"labels: expected to count from 0 or 1 without a gap, got {sorted(named)[:20]}"
        )


def _class_of(entry: Entry) -> str | None:
    parts = entry.path.split("/")
    return parts[-2] if len(parts) >= 3 else None


def _rows(entries: list[Entry], index: Mapping[str, int], faults: list[str]) -> set[int]:
    rows = set()
    for entry in entries:
        row = index.get("/".join(entry.path.split("/")[-3:]))
        if row is None:
            faults.append(f"{entry.place}: there is no {entry.path}")
        else:
            rows.add(row)
    return rows


def _sides(
    domain: str, rows: Mapping[str, set[int]], faults: list[str]
) -> tuple[set[int], set[int]]:
    train, test = rows["train"], rows["test"]
    crossval = rows.get("crossval", set())
    if train <= test and train:
        test = crossval - train
        if not test:
            faults.append(
                f"{domain}: the test list repeats the training list, and no crossval list is left"
            )
    elif overlap := len(train & test):
        faults.append(
            f"{domain}: {overlap} pictures stand both in the training and in the test list"
        )
    else:
        train = train | (crossval - test)
    return train, test
