"""What a sweep shows, computed from its rows: gains, changes, and their spread over seeds.

Every difference is paired: a masked run is compared with the baseline of the same source, target and seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastmask.report.rows import MASKED, STARTS, STRATEGIES, Row
from fastmask.report.student import t_quantile

# Unmasked fine-tuning goes on from the source-trained weights, scratch from the initial ones.
_PREFERRED = {"none": ("source-end", *STARTS), "scratch": STARTS}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; `std` is None for one value.

    Of differences, the n values are one a seed, each averaged over the pairs of domains. Seeds are the
    replicates: the pairs of a seed share masks and test pictures, so that counting them one by one would make
    the mean look surer than it is. The interval tells how far another set of seeds might move the mean, on
    these domains, these pictures and this split.
    """

    mean: float
    std: float | None
    n: int

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95 % confidence interval `mean ± t(n - 1) * std / sqrt(n)`; None for one value."""
        if self.std is None:
            return None
        half = t_quantile(self.n - 1) * self.std / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval contains 0; None for one value, of which nothing can be said."""
        if self.ci95 is None:
            return None
        low, high = self.ci95
        return low <= 0.0 <= high


def spread(values: Iterable[float]) -> Spread:
    """Summarise values: `mean = sum(v) / n`, `std = sqrt(sum((v - mean)^2) / (n - 1))`.

    Raises:
        ValueError: there are no values.
    """
    given = list(values)
    if not given:
        raise ValueError("values: expected at least one, got none")
    mean = math.fsum(given) / len(given)
    if len(given) == 1:
        return Spread(mean, None, 1)
    square = math.fsum((value - mean) ** 2 for value in given) / (len(given) - 1)
    return Spread(mean, math.sqrt(square), len(given))


def in_order(found: Iterable[str], order: Sequence[str]) -> list[str]:
    """Sort names: those of `order` in its order, then the rest by name."""
    place = {name: i for i, name in enumerate(order)}
    return sorted(set(found), key=lambda name: (place.get(name, len(place)), name))


def sources(rows: Sequence[Row]) -> list[str]:
    """Source domains by name: a sweep's rows come in the order that was fastest to run."""
    return sorted({row.source for row in rows})


def seeds(rows: Sequence[Row]) -> list[int]:
    """Seeds, ascending."""
    return sorted({row.seed for row in rows})


def strategies(rows: Sequence[Row]) -> list[str]:
    """Strategies that ran: none, naive, editor, binary, scratch, then any other by name."""
    return in_order((row.strategy for row in rows), STRATEGIES)


def starts(rows: Sequence[Row], strategy: str) -> list[str]:
    """Starts that `strategy` ran with, the default first."""
    found = (row.start for row in rows if row.strategy == strategy)
    return in_order(found, _PREFERRED.get(strategy, STARTS))


def default_start(rows: Sequence[Row], strategy: str) -> str | None:
    """The start that stands for `strategy` where one is shown: source-start if it ran."""
    return next(iter(starts(rows, strategy)), None)


def of(rows: Sequence[Row], strategy: str, start: str | None = None) -> list[Row]:
    """Rows of one strategy with one start (None: its default start)."""
    chosen = default_start(rows, strategy) if start is None else start
    return [row for row in rows if row.strategy == strategy and row.start == chosen]


def paired_difference(
    rows: Sequence[Row],
    strategy: str,
    value: Callable[[Row], float],
    *,
    start: str | None = None,
    against: str = "none",
) -> dict[tuple[str, str, int], float]:
    """Compute `value(run) - value(baseline)` for each (source, target, seed) that both ran.

    Args:
        rows: the sweep.
        strategy: the strategy compared.
        value: what is compared, such as `lambda row: row.source_accuracy`.
        start: where the free entries began; None for the strategy's default start.
        against: the strategy that is the baseline.
    """
    base = {(row.source, row.target, row.seed): value(row) for row in of(rows, against)}
    return {
        key: value(row) - base[key]
        for row in of(rows, strategy, start)
        if (key := (row.source, row.target, row.seed)) in base
    }


def per_source(differences: Mapping[tuple[str, str, int], float]) -> dict[str, Spread]:
    """Average over targets within a seed, then summarise over seeds, for each source."""
    return {
        source: spread(by_seed.values())
        for source, by_seed in _by_source_and_seed(differences).items()
    }


def over_sources(differences: Mapping[tuple[str, str, int], float]) -> Spread | None:
    """Average over targets, then over sources within a seed; summarise over seeds."""
    by_seed: dict[int, list[float]] = {}
    for values in _by_source_and_seed(differences).values():
        for seed, value in values.items():
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return None
    return spread(math.fsum(values) / len(values) for values in by_seed.values())


def _by_source_and_seed(
    differences: Mapping[tuple[str, str, int], float],
) -> dict[str, dict[int, float]]:
    cells: dict[str, dict[int, list[float]]] = {}
    for (source, _, seed), value in differences.items():
        cells.setdefault(source, {}).setdefault(seed, []).append(value)
    return {
        source: {seed: math.fsum(values) / len(values) for seed, values in by_seed.items()}
        for source, by_seed in cells.items()
    }


def source_gain(
    rows: Sequence[Row], strategy: str, start: str | None = None, against: str = "none"
) -> dict[str, Spread]:
    """Compute `mean over T of acc_S(masked) - acc_S(unmasked)` per source, over seeds.

    Source: arXiv 2308.13957, Table 1, "S Gain".
    """
    return per_source(
        paired_difference(rows, strategy, _source_accuracy, start=start, against=against)
    )


def target_change(
    rows: Sequence[Row], strategy: str, start: str | None = None, against: str = "none"
) -> dict[str, Spread]:
    """Compute `mean over T of acc_T(masked) - acc_T(unmasked)` per source, over seeds.

    Source: arXiv 2308.13957, Table 1, "T Drop" (signed; higher is better).
    """
    return per_source(
        paired_difference(rows, strategy, _target_accuracy, start=start, against=against)
    )


def mean_source_gain(
    rows: Sequence[Row], strategy: str, start: str | None = None, against: str = "none"
) -> Spread | None:
    """Average `source_gain` over sources within a seed; None where nothing can be compared."""
    return over_sources(
        paired_difference(rows, strategy, _source_accuracy, start=start, against=against)
    )


def mean_target_change(
    rows: Sequence[Row], strategy: str, start: str | None = None, against: str = "none"
) -> Spread | None:
    """Average `target_change` over sources within a seed; None where nothing can be compared."""
    return over_sources(
        paired_difference(rows, strategy, _target_accuracy, start=start, against=against)
    )


def level(rows: Sequence[Row], value: Callable[[Row], float]) -> Spread | None:
    """Average a value over targets, then over sources within a seed; summarise over seeds."""
    return over_sources({(row.source, row.target, row.seed): value(row) for row in rows})


@dataclass(frozen=True)
class Contest:
    """In which sources one strategy kept the source better than every rival that ran."""

    strategy: str
    rivals: tuple[str, ...]
    won: tuple[str, ...]
    compared: tuple[str, ...]


def keeps_source_best(rows: Sequence[Row], strategy: str = "binary") -> Contest:
    """Say in which sources `strategy` beats every other mask by source accuracy after fine-tuning.

    Each strategy stands with its default start; a source counts as compared where at least one rival
    ran with the same target and seed. A tie is no win.
    """
    rivals = tuple(name for name in MASKED if name != strategy and of(rows, name))
    lead = {
        rival: per_source(paired_difference(rows, strategy, _source_accuracy, against=rival))
        for rival in rivals
    }
    compared = tuple(s for s in sources(rows) if any(s in lead[rival] for rival in rivals))
    won = tuple(
        s
        for s in compared
        if all(lead[rival][s].mean > 0.0 for rival in rivals if s in lead[rival])
    )
    return Contest(strategy, rivals, won, compared)


def _source_accuracy(row: Row) -> float:
    return row.source_accuracy


def _target_accuracy(row: Row) -> float:
    return row.target_accuracy
