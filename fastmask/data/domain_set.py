"""A data set of several domains over the same classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data import splits
from fastmask.data.splits import Split
from fastmask.errors import DataError, require

NAMED = 20


class DomainSet:
    """Pictures of the same classes in several domains, with splits that keep copies on one side.

    Args:
        name: of the set.
        classes: names, in the order of the labels.
        labels: domain -> int64 (n,), each in [0, len(classes)).
        groups: domain -> n names; pictures whose names are equal, in whichever domain, are never split up.
        picture: (domain, row) -> uint8 RGB (3, H, W).
        content: domain -> a digest of all its pictures, in order.
        item: (domain, row) -> how to name a picture to a person.
        test_fraction: share of each class that is for testing, in (0, 1).
        fixed: domain -> (training rows, test rows), where the split is given rather than drawn.

    Raises:
        DataError: fewer than two domains or classes, or a class that cannot be split.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        labels: Mapping[str, Tensor],
        groups: Mapping[str, tuple[str, ...]],
        picture: Callable[[str, int], Tensor],
        content: Mapping[str, str],
        item: Callable[[str, int], str],
        *,
        test_fraction: float = 0.3,
        fixed: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: expected a number in (0, 1), got {test_fraction}")
        self.name = name
        self.domains = tuple(labels)
        self.classes = classes
        self.test_fraction = float(test_fraction)
        self._labels = dict(labels)
        self._groups = dict(groups)
        self._picture = picture
        self._content = dict(content)
        self._item = item
        self._fixed = None if fixed is None else dict(fixed)
        self._drawn: dict[tuple[int, float], dict[str, Split]] = {}
        self._check()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{domain} {len(self._labels[domain])}" for domain in self.domains)
        return f"DomainSet({self.name}: {len(self.classes)} classes; {sizes})"

    @property
    def fingerprint(self) -> str:
        """sha256 of the domains' names, classes, labels and pictures."""
        said = {
            "classes": self.classes,
            "domains": {d: [self._content[d], self._labels[d].tolist()] for d in self.domains},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def content(self, domain: str) -> str:
        """A digest of a domain's pictures, in order."""
        return self._content[self._known(domain)]

    def labels(self, domain: str) -> Tensor:
        """The class of each picture of a domain: int64 (n,)."""
        return self._labels[self._known(domain)]

    def image(self, domain: str, row: int) -> Tensor:
        """One picture, uint8 RGB (3, H, W).

        Raises:
            DataError: its file cannot be decoded; the message names it.
        """
        try:
            return self._picture(self._known(domain), row)
        except DataError as error:
            raise DataError(f"{self.item(domain, row)}: {error}") from error

    def item(self, domain: str, row: int) -> str:
        """How to name a picture to a person: its path below the folder, for files."""
        return self._item(self._known(domain), row)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many pictures each class of each domain has."""
        return {
            domain: dict(zip(self.classes, counted(labels, len(self.classes)), strict=True))
            for domain, labels in self._labels.items()
        }

    def split(self, domain: str, seed: int = 0, holdout: float = 0.0) -> Split:
        """Split a domain into training and test rows, class by class, groups being kept whole.

        Args:
            domain: one of `domains`.
            seed: of the draw; given split files leave it only the held-out part to decide.
            holdout: share of the training part to hold out as `val`, in [0, 1); 0 holds out none.

        Returns:
            Split(train, test, val). `train` and `val` together are what `train` is without a holdout.

        Deterministic: depends on labels, groups, seed and shares alone.
        """
        self._known(domain)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout: expected a number in [0, 1), got {holdout}")
        key = (seed, float(holdout))
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        return self._drawn[key][domain]

    def examples(
        self, domain: str, per_class: int = 1, side: int = 96
    ) -> dict[str, list[NDArray[np.uint8]]]:
        """The first pictures of each class for a contact sheet, uint8 (H, W, 3), no side over `side`."""
        labels = self.labels(domain)
        found: dict[str, list[NDArray[np.uint8]]] = {}
        for index, name in enumerate(self.classes):
            rows = (labels == index).nonzero()[:per_class, 0].tolist()
            found[name] = [_thumbnail(self.image(domain, row), side) for row in rows]
        return found

    def _known(self, domain: str) -> str:
        if domain not in self._labels:
            raise ValueError(f"domain: expected one of {', '.join(self.domains)}, got {domain!r}")
        return domain

    def _check(self) -> None:
        if len(self.domains) < 2:
            raise DataError(
                f"{self.name}: expected at least two domains, got {', '.join(self.domains) or 'none'}"
            )
        if len(self.classes) < 2:
            raise DataError(
                f"{self.name}: expected at least two classes, got {', '.join(self.classes) or 'none'}"
            )
        raise_faults(self.name, class_faults(self.classes, self._labels, self._groups))
        if self._fixed is not None:
            raise_faults(self.name, side_faults(self.classes, self._labels, self._fixed))

    def _draw(self, seed: int, holdout: float) -> dict[str, Split]:
        """The splits of all domains, drawn together: a group may lie in several."""
        if self._fixed is not None:
            parts = dict(self._fixed)
        else:
            parts = drawn_sides(self._labels, self._groups, self.test_fraction, seed)
            raise_faults(self.name, side_faults(self.classes, self._labels, parts))
        if holdout == 0:
            return {domain: Split(train, test) for domain, (train, test) in parts.items()}
        training = {domain: train for domain, (train, _) in parts.items()}
        items = splits.items_of(self._labels, self._groups, training)
        held = splits.take(items, holdout, seed, "val")
        found = {}
        for domain, (train, test) in parts.items():
            kept, val = _sides(train, held[domain])
            found[domain] = Split(kept, test, val)
        return found


def class_faults(
    classes: Sequence[str], labels: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """A line for each class of each domain that has too few different pictures to be split."""
    faults = []
    for domain, said in labels.items():
        distinct: dict[int, set[str]] = {}
        for label, group in zip(said.tolist(), groups[domain], strict=True):
            distinct.setdefault(label, set()).add(group)
        for index, (name, n) in enumerate(zip(classes, counted(said, len(classes)), strict=True)):
            if n == 0:
                faults.append(f"{domain}/{name}: no images")
            elif n == 1:
                faults.append(f"{domain}/{name}: one image, which cannot be split")
            elif len(distinct[index]) == 1:
                faults.append(f"{domain}/{name}: {n} copies of one image, which cannot be split")
    return faults


def drawn_sides(
    labels: Mapping[str, Tensor], groups: Mapping[str, tuple[str, ...]], fraction: float, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """domain -> (training rows, test rows) of the split that a seed draws."""
    taken = splits.take(splits.items_of(labels, groups), fraction, seed, "test")
    return {
        domain: _sides(torch.arange(len(labels[domain])), rows) for domain, rows in taken.items()
    }


def side_faults(
    classes: Sequence[str],
    labels: Mapping[str, Tensor],
    parts: Mapping[str, tuple[Tensor, Tensor]],
) -> list[str]:
    """A line for each class of each domain that has no picture in the training or in the test part."""
    return [
        f"{domain}/{name}: no image in the {side} part"
        for domain, sides in parts.items()
        for side, rows in zip(("training", "test"), sides, strict=True)
        for name, n in zip(classes, counted(labels[domain][rows], len(classes)), strict=True)
        if n == 0
    ]


def counted(labels: Tensor, classes: int) -> list[int]:
    """How many rows each class has."""
    found: list[int] = torch.bincount(labels, minlength=classes).tolist()
    return found


def raise_faults(name: str, faults: list[str]) -> None:
    """Raise one DataError that lists up to 20 faults and counts the rest; nothing where there is none."""
    if not faults:
        return
    shown = faults[:NAMED]
    if len(faults) > NAMED:
        shown.append(f"and {len(faults) - NAMED} more; `fastmask data check` names all")
    heading = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise DataError(f"{name}: {heading} in the data\n" + "\n".join(f"  {line}" for line in shown))


def _sides(rows: Tensor, taken: set[int]) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor([row in taken for row in rows.tolist()], dtype=torch.bool)
    return rows[~chosen], rows[chosen]


def _thumbnail(picture: Tensor, side: int) -> NDArray[np.uint8]:
    array = picture.permute(1, 2, 0).contiguous().numpy()
    if max(array.shape[:2]) <= side:
        return array
    require("PIL", extra="vision")
    from PIL import Image

    image = Image.fromarray(array)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)
