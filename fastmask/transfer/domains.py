"""The features a sweep works on: checked once, and cut into what is trained on and what is tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.data import Features
from fastmask.errors import DataError


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a domain: x float32 (n, K), y int64 (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Domain:
    """A domain as the stages see it."""

    train: Part
    test: Part


def prepare(
    features: Mapping[str, Features], classes: tuple[str, ...], held_out: bool, device: torch.device
) -> dict[str, Domain]:
    """Check features and cut them; with `held_out`, the part to test on is `val`.

    Raises:
        TypeError: x is not float32 or y not int64.
        DataError: fewer than two domains, other widths, values that are not finite, labels that are no
            class, an index beyond the rows, a part without rows, or a class without training rows.
    """
    if len(features) < 2:
        raise DataError(f"features: expected at least two domains, got {len(features)}")
    width = next(iter(features.values())).x.shape[-1]
    found = {}
    for name, given in features.items():
        _check(name, given, len(classes), width)
        test = given.val if held_out else given.test
        for part, rows in (("train", given.train), ("val" if held_out else "test", test)):
            _check_rows(name, part, rows, len(given.y))
        train = _part(given, given.train, device)
        counts = torch.bincount(train.y, minlength=len(classes))
        if lacking := [classes[i] for i in (counts == 0).nonzero()[:, 0].tolist()]:
            raise DataError(f"{name}: no training rows of class {', '.join(lacking)}")
        found[name] = Domain(train, _part(given, test, device))
    return found


def _part(given: Features, rows: Tensor, device: torch.device) -> Part:
    return Part(given.x[rows].to(device), given.y[rows].to(device))


def _check(name: str, given: Features, classes: int, width: int) -> None:
    if given.x.dtype != torch.float32 or given.y.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected x float32 and y int64, got {given.x.dtype} and {given.y.dtype}"
        )
    if given.x.dim() != 2 or given.y.shape != given.x.shape[:1]:
        raise DataError(
            f"{name}: expected x (n, K) and y (n,), got {tuple(given.x.shape)} and {tuple(given.y.shape)}"
        )
    if given.x.shape[1] != width or width == 0:
        raise DataError(
            f"{name}: expected {width} features as in the first domain, got {given.x.shape[1]}"
        )
    wrong = (~given.x.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        raise DataError(
            f"{name}: {len(wrong)} of {len(given.x)} rows of features are not finite, first row {wrong[0]}"
        )
    if len(given.y) and not (int(given.y.min()) >= 0 and int(given.y.max()) < classes):
        raise DataError(
            f"{name}: expected labels in [0, {classes}), got {int(given.y.min())} to {int(given.y.max())}"
        )


def _check_rows(name: str, part: str, rows: Tensor, n: int) -> None:
    if len(rows) == 0:
        raise DataError(f"{name}: its {part} part has no rows")
    if not (int(rows.min()) >= 0 and int(rows.max()) < n):
        raise DataError(
            f"{name}: {part} rows: expected indices in [0, {n}), got {int(rows.min())} to {int(rows.max())}"
        )
