"""Checks of single settings; each raises with the setting's name, what was expected and what came."""

from __future__ import annotations

import math
import os
from typing import Any


def names(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name}: expected several names, got {value!r}")
    found = tuple(value)
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: expected each name once, got {', '.join(found)}")
    return found


def text(name: str, value: Any) -> str | None:
    if value is None and name in ("splits", "weights", "cache", "backbone"):
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}: expected a name or a path, got {value!r}")
    return value


def one_of(name: str, values: tuple[Any, ...], known: tuple[Any, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: expected {', '.join(map(str, known))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless `value` is a finite number with above < value < below and least <= value <= most."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and above < value < below and least <= value <= most):
        said = [
            f"{word} {bound:g}"
            for word, bound in (
                ("above", above), ("at least", least), ("at most", most), ("below", below),
            )
            if math.isfinite(bound)
        ]  # fmt: skip
        wanted = " and ".join(["a finite number", *said])
        raise ValueError(f"{name}: expected {wanted}, got {value}")
