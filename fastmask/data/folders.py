"""Data as it is unpacked: `folder/domain/class/image`."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastmask.data import images, split_files
from fastmask.data.domain_set import DomainSet, raise_faults
from fastmask.errors import DataError

T = TypeVar("T")

# What file managers and archivers leave behind.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
_ENDINGS = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """domain -> class -> files, all sorted by name; and the folders that cannot be listed, and why."""

    files: dict[str, dict[str, list[Path]]]
    unlisted: dict[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of any domain."""
        return tuple(sorted({name for found in self.files.values() for name in found}))


def load(
    folder: Path,
    test_fraction: float = 0.3,
    splits: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DomainSet:
    """Read which pictures a folder holds; headers are checked here, pixels when they are used.

    Every file is read once: its bytes are the key of cached features, and equal files, wherever they lie,
    stay on one side of every split.
    """

    def look(path: Path) -> tuple[str, str | None]:
        try:
            content = images.contents(path)
        except DataError as error:
            return "", str(error)
        return digest(content), images.fault(content)

    layout = scan(folder)
    raise_faults(str(folder), unlisted_faults(layout))
    if said := shape_fault(folder, layout):
        raise DataError(said)
    raise_faults(f"{folder}: the classes differ between domains", class_set_faults(layout))
    paths = [path for found in layout.files.values() for files in found.values() for path in files]
    seen = dict(zip(paths, inspect(paths, look, progress), strict=True))
    faults = [f"{below(path, folder)}: {said}" for path, (_, said) in seen.items() if said]
    raise_faults(str(folder), faults + empty_faults(layout))
    digests = {path: found for path, (found, _) in seen.items()}
    labels, files, groups = rows_of(layout, digests)

    def item(domain: str, row: int) -> str:
        return below(files[domain][row], folder)

    fixed = None
    if splits is not None:
        names = {d: [item(d, row) for row in range(len(files[d]))] for d in files}
        fixed = split_files.read(splits, names, groups)

    def picture(domain: str, row: int) -> Tensor:
        return images.read(files[domain][row])

    return DomainSet(
        folder.resolve().name or str(folder),
        layout.classes,
        labels,
        groups,
        picture,
        {d: hashlib.sha256("\n".join(said).encode()).hexdigest() for d, said in groups.items()},
        item,
        test_fraction=test_fraction,
        fixed=fixed,
    )


def scan(folder: Path) -> Layout:
    """List a folder `domain/class/image`; a folder without folders is no domain.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; expected DIR/domain/class/image, or the name 'digits' "
            f"for the data that come with fastmask"
        )
    layout = Layout({}, {})

    def listed(which: Callable[[Path], list[Path]], place: Path) -> list[Path]:
        try:
            return which(place)
        except OSError as error:
            layout.unlisted[below(place, folder)] = error.strerror or str(error)
            return []

    for domain in listed(_folders, folder):
        classes = {child.name: listed(_files, child) for child in listed(_folders, domain)}
        if classes:
            layout.files[domain.name] = classes
    return layout


def rows_of(
    layout: Layout, digests: Mapping[Path, str]
) -> tuple[dict[str, Tensor], dict[str, list[Path]], dict[str, tuple[str, ...]]]:
    """domain -> labels, files and groups (digests) of the rows that have a digest, class after class."""
    labels, files, groups = {}, {}, {}
    for domain, found in layout.files.items():
        rows = [
            (label, path)
            for label, name in enumerate(layout.classes)
            for path in found.get(name, ())
            if path in digests
        ]
        labels[domain] = torch.tensor([label for label, _ in rows], dtype=torch.int64)
        files[domain] = [path for _, path in rows]
        groups[domain] = tuple(digests[path] for _, path in rows)
    return labels, files, groups


def shape_fault(folder: Path, layout: Layout) -> str | None:
    """Why a folder cannot be domains of classes of pictures, with a hint where it may lie elsewhere."""
    found = layout.files
    if not found:
        return f"{folder}: no images; expected DIR/domain/class/image{_hint(folder)}"
    if len(found) == 1:
        return (
            f"{folder}: one domain alone ({next(iter(found))}), expected at least two of "
            f"DIR/domain/class/image"
        )
    if not any(files for classes in found.values() for files in classes.values()):
        deeper = "; is it one folder further down?" if _deeper(folder) else ""
        return f"{folder}: no images; expected DIR/domain/class/image{deeper}"
    return None


def class_set_faults(layout: Layout) -> list[str]:
    """A line for each domain that lacks classes of others, and for names that differ in case alone."""
    every = layout.classes
    faults = []
    for domain, classes in layout.files.items():
        if missing := [name for name in every if name not in classes]:
            faults.append(
                f"{domain}: {len(missing)} of {len(every)} classes missing: {_few(missing)}"
            )
    if faults:
        faults += [
            f"{' and '.join(names)} differ by upper and lower case alone"
            for names in same_but_for_case(every)
        ]
    return faults


def unlisted_faults(layout: Layout) -> list[str]:
    """A line for each folder that cannot be listed."""
    return [f"{place}: cannot be listed ({why})" for place, why in layout.unlisted.items()]


def empty_faults(layout: Layout) -> list[str]:
    """A line for each class folder without a file."""
    return [
        f"{domain}/{name}: no images"
        for domain, found in layout.files.items()
        for name, files in found.items()
        if not files and f"{domain}/{name}" not in layout.unlisted
    ]


def same_but_for_case(names: Iterable[str]) -> list[list[str]]:
    """Names that a file system which ignores case, or the form of accents, takes for one."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [found for found in folded.values() if len(found) > 1]


def inspect(
    paths: Sequence[Path],
    look: Callable[[Path], T],
    progress: Callable[[str, int, int], None] | None,
) -> list[T]:
    """What `look` says of each file, several at a time."""
    found = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            for done, said in enumerate(pool.map(look, paths), start=1):
                found.append(said)
                if progress and (done % 256 == 0 or done == len(paths)):
                    progress("reading pictures", done, len(paths))
        except BaseException:
            # Ctrl-C would otherwise wait for every file that is still to be read.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def digest(content: bytes) -> str:
    """What equal files have in common."""
    return hashlib.sha256(content).hexdigest()


def below(path: Path, folder: Path) -> str:
    """A path as it is named to people: below the folder, with slashes."""
    return path.relative_to(folder).as_posix()


def passed_over(folder: Path, layout: Layout) -> list[tuple[Path, str]]:
    """What lies in a folder and takes no part, and why; what file managers leave behind is not named."""
    found: list[tuple[Path, str]] = []

    def add(place: Path, taken: Container[str], why: str) -> None:
        with suppress(OSError):
            children = sorted(place.iterdir())
            found.extend(
                (p, why)
                for p in children
                if p.name not in taken
                and not _litter(p)
                and below(p, folder) not in layout.unlisted
            )

    add(folder, layout.files, "no domain: it holds no class folders")
    for domain, classes in layout.files.items():
        add(folder / domain, classes, "beside the class folders")
        for name, files in classes.items():
            add(folder / domain / name, {path.name for path in files}, "in a class, and no file")
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not _litter(child))


def _files(folder: Path) -> list[Path]:
    """All files of a class: one that is no image, or a link to nothing, is named rather than passed over."""
    return sorted(
        child
        for child in folder.iterdir()
        if (child.is_file() or _dangling(child)) and not _litter(child)
    )


def _dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _litter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _LITTER


def _hint(folder: Path) -> str:
    if any(child.suffix.lower() in _ENDINGS for child in folder.iterdir()):
        return "; this folder holds images itself, so it is a class: pass the folder two levels up"
    if any(_files(child) for child in _folders(folder)):
        return "; the folders in it hold files, so it is a domain: pass the folder one level up"
    return ""


def _deeper(folder: Path) -> bool:
    return any(
        _files(third)
        for one in _folders(folder)
        for two in _folders(one)
        for third in _folders(two)
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
