"""What varying a knob does: the runs of each setting against unmasked fine-tuning, in order of its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmask.report import metrics
from fastmask.report.mask_rows import MaskRow
from fastmask.report.metrics import Spread
from fastmask.report.rows import MASKED, Row
from fastmask.report.run_folder import RunFolder

# What a knob is to a reader.
_KNOBS = {
    "beta": "beta (freezes logits > 0)",
    "density": "share frozen",
    "editor_k": "k of its rule",
    "editor_share": "share frozen",
    "lowrank_energy": "energy kept",
    "naive_k": "k of its rule",
    "tau": "temperature tau",
}


@dataclass(frozen=True)
class Point:
    """A strategy with a knob at `value`; at the sweep's own settings `setting` is "" and `value` is NaN."""

    strategy: str
    setting: str
    value: float
    density: Spread
    gain: Spread
    change: Spread


@dataclass(frozen=True)
class Curve:
    """A strategy as one of its knobs varies, by ascending value."""

    strategy: str
    knob: str
    points: tuple[Point, ...]


def knob_label(knob: str) -> str:
    """What a reader calls a knob."""
    return _KNOBS.get(knob, knob.replace("_", " "))


def curves(folder: RunFolder) -> list[Curve]:
    """The curves of a sweep, by strategy, then by knob; points without a baseline are left out."""
    settings: dict[tuple[str, str], dict[float, str]] = {}
    for row in folder.varied:
        knob, value = knob_and_value(row.setting)
        settings.setdefault((row.strategy, knob), {})[value] = row.setting
    base = [row for row in folder.rows if row.strategy == "none"]
    found = []
    for strategy in metrics.in_order((name for name, _ in settings), MASKED):
        for knob in sorted(name for owner, name in settings if owner == strategy):
            points = []
            for value, setting in sorted(settings[strategy, knob].items()):
                mine = [r for r in folder.varied if (r.strategy, r.setting) == (strategy, setting)]
                if (point := _point([*base, *mine], strategy, setting, value)) is not None:
                    points.append(point)
            if points:
                found.append(Curve(strategy, knob, tuple(points)))
    return found


def own_points(folder: RunFolder) -> list[Point]:
    """Each strategy at the sweep's own settings and its default start."""
    points = (
        _point(folder.rows, name, "", math.nan)
        for name in metrics.strategies(folder.rows)
        if name in MASKED
    )
    return [point for point in points if point is not None]


def own_value(folder: RunFolder, knob: str) -> float | None:
    """The sweep's own value of a knob; None where its own settings lie on no curve of the knob."""
    value = folder.config.get(knob)
    # A varied beta freezes what has a logit above 0, a given density does not.
    if knob == "beta" and folder.config.get("density") is not None:
        return None
    return float(value) if isinstance(value, int | float) else None


def knob_and_value(setting: str) -> tuple[str, float]:
    """Read `beta=0.3`."""
    knob, _, value = setting.partition("=")
    return knob, float(value)


def of_masks(
    rows: Sequence[MaskRow],
    strategy: str,
    setting: str,
    value: Callable[[MaskRow], float | None],
) -> Spread | None:
    """Average a figure of masks over sources within a seed, then summarise over seeds."""
    found = {
        (row.source, "", row.seed): number
        for row in rows
        if (row.strategy, row.setting) == (strategy, setting) and (number := value(row)) is not None
    }
    return metrics.over_sources(found)


def _point(rows: Sequence[Row], strategy: str, setting: str, value: float) -> Point | None:
    density = metrics.level(metrics.of(rows, strategy), lambda row: row.frozen_density)
    gain = metrics.mean_source_gain(rows, strategy)
    change = metrics.mean_target_change(rows, strategy)
    if density is None or gain is None or change is None:
        return None
    return Point(strategy, setting, value, density, gain, change)
