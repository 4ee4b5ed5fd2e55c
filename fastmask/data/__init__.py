"""Domains to learn from: the embedded digits or a folder of images, and features of a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastmask.data.check import Finding, Place, Report, check
from fastmask.data.domain_set import DomainSet
from fastmask.data.features import Features, extract
from fastmask.data.splits import Split

__all__ = [
    "DomainSet",
    "Features",
    "Finding",
    "Place",
    "Report",
    "Split",
    "check",
    "extract",
    "load",
]


def load(
    data: str | Path = "digits",
    *,
    test_fraction: float = 0.3,
    splits: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DomainSet:
    """Load the domains of a data set.

    Args:
        data: "digits", four domains drawn on the spot, or a folder `domain/class/image` (PACS,
            Office-Home, DomainNet as they are unpacked; a folder named digits is "./digits").
        test_fraction: share of each class of each domain that is for testing, in (0, 1).
        splits: folder of published lists to take instead of a drawn split: `<domain>_train_kfold.txt`,
            `_crossval_kfold.txt` and `_test_kfold.txt` (PACS), or `<domain>_train.txt` and `_test.txt`.
        progress: called with a label, files read and files in all.

    Raises:
        DataError: fewer than two domains, classes that differ, empty classes, a class of one image, files
            that are no images, lists that do not fit; each is named, up to 20.
        MissingPackage: the extra `vision` must be installed.

    Deterministic: the digits are drawn from a fixed seed; a split depends on labels, groups and seed alone.
    """
    if not isinstance(data, str | Path):
        raise TypeError(f"data: expected 'digits' or a folder, got {type(data).__name__}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a number in (0, 1), got {test_fraction}")
    if data == "digits":
        if splits is not None:
            raise ValueError("splits: lists belong to a folder of images, the digits have none")
        from fastmask.data import digits

        return digits.load(float(test_fraction))
    from fastmask.data import folders

    lists = None if splits is None else Path(splits).expanduser()
    return folders.load(Path(data).expanduser(), test_fraction, lists, progress)
