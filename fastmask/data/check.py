"""What is wrong with a folder of images, all of it at once, before a long run finds it piece by piece."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from fastmask.data import folders, images, split_files
from fastmask.data.domain_set import class_faults, counted, drawn_sides, side_faults
from fastmask.data.folders import Layout
from fastmask.data.images import PictureError
from fastmask.errors import DataError, require

# With fewer test pictures, one of them is more than a fifth of its class's accuracy.
FEW = 5

# What each kind of finding is, and what to do about it. Of the traits: what becomes of such pictures.
ERRORS = {
    "unlisted": ("folders that cannot be listed", "give yourself the right to read and enter them"),
    "shape": ("not laid out as domain/class/image", "pass the folder that holds the domains"),
    "classes": (
        "domains whose class folders differ",
        "rename or move folders until every domain has the same classes",
    ),
    "no-images": (
        "classes without a picture",
        "add pictures, or remove the class from every domain",
    ),
    "unreadable": ("files that cannot be read", "mend the permission or the link, or delete them"),
    "empty": ("empty files", "fetch them again, or delete them"),
    "pointer": ("git-LFS pointers in place of pictures", "run `git lfs pull` in their repository"),
    "foreign": (
        "files that are no images",
        "move them out of the class folder, or fetch them again",
    ),
    "damaged": ("damaged or truncated images", "fetch them again, or delete them"),
    "large": ("images that declare too many pixels", "scale them down, or delete them"),
    "range": ("pixels whose range is not known", "convert them to 8 or 16 bits"),
    "unsplittable": (
        "classes with too few different pictures to split",
        "add pictures, or remove the class from every domain",
    ),
    "lists": ("split files that do not fit the folder", "mend the lists, or leave out --splits"),
    "sides": (
        "classes missing from one side of the split",
        "mend the lists; without lists, add pictures that are no copies",
    ),
}
WARNINGS = {
    "cmyk": ("CMYK pictures", "converted to RGB without their colour profile"),
    "colours": ("LAB, HSV or YCbCr pictures", "converted to RGB"),
    "sixteen": ("16-bit grey pictures", "their upper 8 bits are kept"),
    "palette": ("palette pictures", "converted to RGB"),
    "transparent": ("transparent pictures", "laid on white"),
    "frames": ("animations and files of several pictures", "the first one is taken"),
    "rotated": ("pictures turned by EXIF", "turned upright"),
    "ending": (
        "names whose ending is of another format",
        "read by their content; rename them for other programs",
    ),
    "case": (
        "names that differ in case or accents alone",
        "rename them: some file systems keep only one",
    ),
    "name": (
        "names with control characters or not in UTF-8",
        "rename them: lists cannot name them and terminals garble them",
    ),
    "links": ("symbolic links", "followed; the run changes when what they point to changes"),
    "copies": ("copies within a class", "kept on one side of every split; delete them"),
    "copies-domains": (
        "copies in several domains",
        "kept on one side of every drawn split; delete those that are of another domain",
    ),
    "copies-classes": (
        "copies in several classes",
        "at most one class is right; delete them from the others",
    ),
    "copies-pixels": (
        "different files with the same pixels",
        "splits take them for different pictures: a copy may be tested on; delete them",
    ),
    "in-no-list": ("pictures in no list", "left out of the run; list them if they were meant"),
    "copies-listed": ("test pictures with a copy in training", "left out of the test part"),
    "copies-sides": (
        "test pictures with a copy in the training part of another domain",
        "tested on although seen in training; take them out of the lists",
    ),
    "few": (
        f"classes with fewer than {FEW} test pictures",
        "add pictures: their accuracy moves in large steps",
    ),
    "passed-over": (
        "files and folders passed over",
        "nothing to do, unless they were meant to be read",
    ),
}


@dataclass(frozen=True)
class Place:
    """A file, a folder or a line of a list, and what is to be said of it alone."""

    path: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}" if self.detail else self.path


@dataclass(frozen=True)
class Finding:
    """One kind of fault: what it is, what to do about it or what becomes of it, and everywhere it is."""

    level: Literal["error", "warning"]
    kind: str
    what: str
    advice: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Report:
    """What `check` found; `counts` is domain -> class -> pictures that can be used."""

    folder: str
    splits: str | None
    classes: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What `load` refuses, or what cannot be decoded."""
        return tuple(found for found in self.findings if found.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What a run survives and its user may not have meant."""
        return tuple(found for found in self.findings if found.level == "warning")


@dataclass(frozen=True)
class _Seen:
    """One file: digests of its bytes and its pixels, its format and traits, or its fault."""

    digest: str
    pixels: bytes = b""
    format: str = ""
    traits: tuple[str, ...] = ()
    fault: PictureError | None = None


class _Found(defaultdict[str, list[Place]]):
    """Places by kind."""

    def __init__(self) -> None:
        super().__init__(list)

    def lines(self, kind: str, faults: Iterable[str]) -> None:
        """Add lines as `load` raises them: a place, a colon, and what is said of it."""
        self[kind] += [Place(*line.split(": ", 1)) for line in faults]

    def findings(self) -> tuple[Finding, ...]:
        """Errors first, in the order of the tables."""
        return (
            *(Finding("error", k, *said, tuple(self[k])) for k, said in ERRORS.items() if self[k]),
            *(
                Finding("warning", k, *said, tuple(self[k]))
                for k, said in WARNINGS.items()
                if self[k]
            ),
        )


def check(
    folder: str | Path,
    splits: str | Path | None = None,
    *,
    test_fraction: float = 0.3,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Read a folder `domain/class/image` as `load` does, decode every picture, and name all faults at once.

    An error is what `load` refuses or what cannot be decoded; a warning is what a run survives and its user
    may not have meant. Nothing is written.

    Args:
        folder: as `load` takes it.
        splits: folder of published lists, as `load` takes it.
        test_fraction: share of each class that a drawn split tests on, in (0, 1).
        progress: called with a label, files read and files in all.

    Returns:
        Report(folder, splits, classes, counts, findings), with `errors` and `warnings` apart.

    Raises:
        DataError: there is no such folder, or no such folder of lists.
        MissingPackage: the extra `vision` must be installed.

    Deterministic: depends on the files alone; a drawn split is that of seed 0.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder: expected a folder, got {type(folder).__name__}")
    if str(folder) == "digits" and not Path(folder).is_dir():
        raise DataError("folder: the digits are drawn by fastmask; they have no files to check")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a number in (0, 1), got {test_fraction}")
    require("PIL", extra="vision")
    root = Path(folder).expanduser()
    lists = None if splits is None else Path(splits).expanduser()
    if lists is not None and not lists.is_dir():
        raise DataError(f"splits: there is no such folder: {lists}")
    layout = folders.scan(root)
    found = _Found()
    _look_at_layout(found, root, layout)

    files = [p for classes in layout.files.values() for ps in classes.values() for p in ps]
    names = {path: folders.below(path, root) for path in files}
    with warnings.catch_warnings():
        # Pillow's remarks name no file; what they are about comes out as a fault or does not matter.
        warnings.filterwarnings("ignore", module="PIL")
        seen = dict(zip(files, folders.inspect(files, _see, progress), strict=True))
    good = {path: said for path, said in seen.items() if said.fault is None}
    _look_at_files(found, seen, names)
    _look_for_copies(found, good, names)

    usable = folders.rows_of(layout, {path: said.digest for path, said in good.items()})
    counts = {
        domain: {
            name: n
            for name, n in zip(layout.classes, counted(labels, len(layout.classes)), strict=True)
            if name in layout.files[domain]
        }
        for domain, labels in usable[0].items()
    }
    # Classes of no files at all have been named.
    bare = {f"{domain}/{name}" for domain in counts for name in layout.classes
            if not layout.files[domain].get(name)}  # fmt: skip
    unfit = class_faults(layout.classes, usable[0], usable[2])
    found.lines("unsplittable", (line for line in unfit if line.split(": ")[0] not in bare))
    if lists is not None:
        # Lists may name broken files: that they are broken is said already.
        every = folders.rows_of(layout, {p: said.digest or names[p] for p, said in seen.items()})
        _look_at_lists(found, lists, layout.classes, every, names)
    elif usable[0] and not unfit:
        sides = drawn_sides(usable[0], usable[2], test_fraction, 0)
        _look_at_sides(found, layout.classes, usable[0], sides)
    return Report(
        str(root), None if lists is None else str(lists), layout.classes, counts, found.findings()
    )


def _look_at_layout(found: _Found, root: Path, layout: Layout) -> None:
    """Folders: those that are missing, differ, are empty, cannot be listed, or take no part."""
    found.lines("unlisted", folders.unlisted_faults(layout))
    if not layout.unlisted and (said := folders.shape_fault(root, layout)):
        found["shape"].append(Place(str(root), said.removeprefix(f"{root}: ")))
    elif len(layout.classes) == 1:
        only = f"one class alone ({layout.classes[0]}), expected at least two"
        found["shape"].append(Place(str(root), only))
    found.lines("classes", folders.class_set_faults(layout))
    found.lines("no-images", folders.empty_faults(layout))
    found["passed-over"] += [
        Place(folders.below(path, root), why) for path, why in folders.passed_over(root, layout)
    ]
    groups = {"": list(layout.files)}
    for domain, classes in layout.files.items():
        groups[f"{domain}/"] = list(classes)
        groups |= {f"{domain}/{name}/": [p.name for p in ps] for name, ps in classes.items()}
    for place, names in groups.items():
        for same in folders.same_but_for_case(names):
            found["case"] += [Place(place + other, f"as {same[0]}") for other in same[1:]]
        found["name"] += [Place(place + name) for name in names if not _plain(name)]
        found["links"] += [
            Place(place + name, f"to {os.readlink(path)}")
            for name in names
            if (path := root / place / name).is_symlink() and path.exists()
        ]


def _plain(name: str) -> bool:
    # A byte that is not UTF-8 is a lone surrogate in the name, which is not printable.
    return name.isprintable()


def _see(path: Path) -> _Seen:
    """Read and decode one file."""
    digest = ""
    try:
        content = images.contents(path)
        digest = folders.digest(content)
        pixels = images.decode(content)
    except PictureError as fault:
        return _Seen(digest, fault=fault)
    shown = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    shown.update(pixels.numpy().tobytes())
    kind, traits = images.traits(content)
    return _Seen(digest, shown.digest(), kind, tuple(traits))


def _look_at_files(found: _Found, seen: Mapping[Path, _Seen], names: Mapping[Path, str]) -> None:
    """Files: those that are no pictures, those that are treated, those named after another format."""
    from PIL import Image

    formats = Image.registered_extensions()
    for path, said in seen.items():
        if said.fault is not None:
            found[said.fault.kind].append(Place(names[path], str(said.fault)))
            continue
        for trait in said.traits:
            found[trait].append(Place(names[path]))
        # Several pictures in one JPEG file are a format of their own to Pillow.
        if formats.get(path.suffix.lower()) != {"MPO": "JPEG"}.get(said.format, said.format):
            found["ending"].append(Place(names[path], f"is {said.format}"))


def _look_for_copies(found: _Found, good: Mapping[Path, _Seen], names: Mapping[Path, str]) -> None:
    """Files with equal bytes, and files with equal pixels where the bytes differ."""
    alike: dict[bytes, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, said in good.items():
        alike[said.pixels][said.digest].append(path)
    for by_digest in alike.values():
        for paths in by_digest.values():
            if len(paths) > 1:
                classes = {path.parent.name for path in paths}
                domains = {path.parent.parent.name for path in paths}
                kind = "-classes" if len(classes) > 1 else "-domains" if len(domains) > 1 else ""
                found["copies" + kind] += _beside_the_first(paths, names)
        if len(by_digest) > 1:
            firsts = [paths[0] for paths in by_digest.values()]
            found["copies-pixels"] += _beside_the_first(firsts, names)


def _beside_the_first(paths: list[Path], names: Mapping[Path, str]) -> list[Place]:
    """A place for each file that could go; the first one may stay."""
    return [Place(names[path], f"as {names[paths[0]]}") for path in paths[1:]]


def _look_at_lists(
    found: _Found,
    lists: Path,
    classes: tuple[str, ...],
    rows: tuple[dict[str, Tensor], dict[str, list[Path]], dict[str, tuple[str, ...]]],
    names: Mapping[Path, str],
) -> None:
    """Published lists: what does not fit, what is left out, what is seen in training and tested on."""
    labels, files, groups = rows
    named = {domain: [names[path] for path in paths] for domain, paths in files.items()}
    said = split_files.examine(lists, named, groups)
    found.lines("lists", said.faults)
    for kind, left in (("in-no-list", said.unlisted), ("copies-listed", said.copies)):
        found[kind] += [Place(named[domain][row]) for domain, some in left.items() for row in some]
    trained = {
        groups[domain][row]: named[domain][row]
        for domain, (train, _) in said.sides.items()
        for row in train.tolist()
    }
    found["copies-sides"] += [
        Place(named[domain][row], f"trained on as {trained[groups[domain][row]]}")
        for domain, (_, test) in said.sides.items()
        for row in test.tolist()
        if groups[domain][row] in trained
    ]
    if not said.faults:
        _look_at_sides(found, classes, labels, said.sides)


def _look_at_sides(
    found: _Found,
    classes: tuple[str, ...],
    labels: Mapping[str, Tensor],
    sides: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Classes that one side of a split lacks, and those of which it holds few."""
    found.lines("sides", side_faults(classes, labels, sides))
    for domain, (_, test) in sides.items():
        for name, n in zip(classes, counted(labels[domain][test], len(classes)), strict=True):
            if 0 < n < FEW:
                found["few"].append(Place(f"{domain}/{name}", f"{n} in the test part"))
