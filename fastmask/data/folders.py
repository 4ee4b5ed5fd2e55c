"""Data as it is unpacked: `folder/domain/class/image`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fastmask.data import images, split_files
from fastmask.data.domain_set import DomainSet, raise_faults
from fastmask.errors import DataError

# What file managers and archivers leave behind.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
_ENDINGS = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip


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
    layout = _layout(folder)
    classes = _same_classes(folder, layout)
    listed = [
        (domain, label, path)
        for domain, found in layout.items()
        for label, name in enumerate(classes)
        for path in found[name]
    ]
    paths = [path for _, _, path in listed]
    digests, faults = _inspect(paths, folder, progress)
    for domain, found in layout.items():
        faults += [f"{domain}/{name}: no images" for name in classes if not found[name]]
    raise_faults(str(folder), faults)

    labels: dict[str, list[int]] = {domain: [] for domain in layout}
    groups: dict[str, list[str]] = {domain: [] for domain in layout}
    files: dict[str, list[Path]] = {domain: [] for domain in layout}
    for (domain, label, path), digest in zip(listed, digests, strict=True):
        labels[domain].append(label)
        groups[domain].append(digest)
        files[domain].append(path)

    def item(domain: str, row: int) -> str:
        return files[domain][row].relative_to(folder).as_posix()

    fixed = None
    if splits is not None:
        names = {d: [item(d, row) for row in range(len(files[d]))] for d in files}
        fixed = split_files.read(splits, names, groups)

    def picture(domain: str, row: int) -> Tensor:
        return images.read(files[domain][row])

    return DomainSet(
        folder.resolve().name or str(folder),
        classes,
        {domain: torch.tensor(said, dtype=torch.int64) for domain, said in labels.items()},
        {domain: tuple(said) for domain, said in groups.items()},
        picture,
        {d: hashlib.sha256("\n".join(said).encode()).hexdigest() for d, said in groups.items()},
        item,
        test_fraction=test_fraction,
        fixed=fixed,
    )


def _layout(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """domain -> class -> image files, all sorted by name; a folder without folders is no domain."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; expected DIR/domain/class/image, or the name 'digits' "
            f"for the data that come with fastmask"
        )
    layout: dict[str, dict[str, list[Path]]] = {}
    for domain in _folders(folder):
        classes = {child.name: _files(child) for child in _folders(domain)}
        if classes:
            layout[domain.name] = classes
    if not layout:
        raise DataError(f"{folder}: no images; expected DIR/domain/class/image{_hint(folder)}")
    if len(layout) == 1:
        raise DataError(
            f"{folder}: one domain alone ({next(iter(layout))}), expected at least two of "
            f"DIR/domain/class/image"
        )
    if not any(files for classes in layout.values() for files in classes.values()):
        deeper = "; is it one folder further down?" if _deeper(folder) else ""
        raise DataError(f"{folder}: no images; expected DIR/domain/class/image{deeper}")
    return layout


def _same_classes(folder: Path, layout: dict[str, dict[str, list[Path]]]) -> tuple[str, ...]:
    every = sorted({name for classes in layout.values() for name in classes})
    faults = []
    for domain, classes in layout.items():
        if missing := [name for name in every if name not in classes]:
            faults.append(
                f"{domain}: {len(missing)} of {len(every)} classes missing: {_few(missing)}"
            )
    if faults:
        folded: dict[str, list[str]] = {}
        for name in every:
            folded.setdefault(name.casefold(), []).append(name)
        faults += [
            f"{' and '.join(names)} differ by upper and lower case alone"
            for names in folded.values()
            if len(names) > 1
        ]
        raise_faults(f"{folder}: the classes differ between domains", faults)
    return tuple(every)


def _inspect(
    paths: list[Path], folder: Path, progress: Callable[[str, int, int], None] | None
) -> tuple[list[str], list[str]]:
    """The digest of each file, and a line for each that is no image."""

    def one(path: Path) -> tuple[str, str | None]:
        try:
            content = path.read_bytes()
        except OSError as error:
            return "", f"cannot be read ({error.strerror or error})"
        return hashlib.sha256(content).hexdigest(), images.fault(content)

    digests, faults = [], []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (path, (digest, fault)) in enumerate(
            zip(paths, pool.map(one, paths), strict=True), start=1
        ):
            digests.append(digest)
            if fault is not None:
                faults.append(f"{path.relative_to(folder).as_posix()}: {fault}")
            if progress and (done % 256 == 0 or done == len(paths)):
                progress("reading pictures", done, len(paths))
    return digests, faults


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not _litter(child))


def _files(folder: Path) -> list[Path]:
    """All files of a class: one that is no image is named to the user rather than passed over."""
    return sorted(child for child in folder.iterdir() if child.is_file() and not _litter(child))


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
