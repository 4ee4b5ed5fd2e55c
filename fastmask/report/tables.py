"""Table 1 and the table of strategies: numbers once, and how a number is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmask.report import metrics, paper
from fastmask.report.metrics import Spread
from fastmask.report.palette import strategy_label
from fastmask.report.rows import Row

# Of a difference as printed; starts that look equal are not told apart by bold type.
DIGITS = 3


@dataclass(frozen=True)
class Table1Line:
    """One start of the binary mask on one source; `source` None is the mean over sources."""

    source: str | None
    start: str
    gain: Spread
    change: Spread
    published: paper.Published | None
    best_gain: bool
    best_change: bool


def table_1(rows: Sequence[Row], strategy: str = "binary") -> list[list[Table1Line]]:
    """Compute the paper's Table 1: a group for each source and one for their mean, a line a start.

    The published values stand beside a run on PACS's four domains only. Starts that cannot be compared
    with unmasked fine-tuning are left out.
    """
    sources: list[str | None] = [*metrics.sources(rows)]
    domains = {row.source for row in rows} | {row.target for row in rows}
    known = paper.applies(domains)
    groups: list[list[Table1Line]] = []
    for source in [*sources, None] if len(sources) > 1 else sources:
        found: list[tuple[str, Spread, Spread]] = []
        for start in metrics.starts(rows, strategy):
            if source is None:
                gain = metrics.mean_source_gain(rows, strategy, start)
                change = metrics.mean_target_change(rows, strategy, start)
            else:
                gain = metrics.source_gain(rows, strategy, start).get(source)
                change = metrics.target_change(rows, strategy, start).get(source)
            if gain is not None and change is not None:
                found.append((start, gain, change))
        if not found:
            continue
        gains = [round(gain.mean, DIGITS) for _, gain, _ in found]
        changes = [round(change.mean, DIGITS) for _, _, change in found]
        # The published mean is one of four sources: beside fewer it would compare unlike things.
        beside = known and (source is not None or len(sources) == len(paper.PACS))
        groups.append(
            [
                Table1Line(
                    source,
                    start,
                    gain,
                    change,
                    paper.published(start, source) if beside else None,
                    gains[i] == max(gains) > min(gains),
                    changes[i] == max(changes) > min(changes),
                )
                for i, (start, gain, change) in enumerate(found)
            ]
        )
    return groups


@dataclass(frozen=True)
class StrategyLine:
    """A strategy averaged over targets and sources; gains are None for the baselines."""

    strategy: str
    start: str
    density: Spread | None
    before: Spread
    after: Spread
    target: Spread
    gain: Spread | None
    change: Spread | None


def strategy_table(rows: Sequence[Row]) -> list[StrategyLine]:
    """Compute density, accuracies and gains of each strategy and start, averaged over the sweep."""
    lines: list[StrategyLine] = []
    for name in metrics.strategies(rows):
        for start in metrics.starts(rows, name):
            mine = metrics.of(rows, name, start)
            levels = [
                metrics.level(mine, value)
                for value in (
                    lambda row: row.frozen_density,
                    lambda row: row.source_accuracy_before,
                    lambda row: row.source_accuracy,
                    lambda row: row.target_accuracy,
                )
            ]
            density, before, after, target = levels
            if before is None or after is None or target is None:
                continue
            masked = name not in ("none", "scratch")
            lines.append(
                StrategyLine(
                    name,
                    start,
                    density if masked else None,
                    before,
                    after,
                    target,
                    metrics.mean_source_gain(rows, name, start) if masked else None,
                    metrics.mean_target_change(rows, name, start) if masked else None,
                )
            )
    return lines


def signed(value: float) -> str:
    """A difference of accuracies as a share of 1, as the paper prints it: `+0.031`."""
    # Adding 0 takes the sign off what rounds to -0.
    return f"{round(value, DIGITS) + 0.0:+.{DIGITS}f}".replace("-", "−")


def percent(value: Spread | None) -> str:
    """A share of 1 in percent: `83.1`."""
    return "–" if value is None else f"{100 * value.mean:.1f}"


def signed_spread(value: Spread | None) -> str:
    """A difference with its spread over seeds: `+0.031 ± 0.004`, or without it for one seed."""
    if value is None:
        return "–"
    return signed(value.mean) + ("" if value.std is None else f" ±\u00a0{value.std:.{DIGITS}f}")


def name_of(line: StrategyLine, lines: Sequence[StrategyLine]) -> str:
    """The strategy, with its start where it ran with several."""
    several = sum(other.strategy == line.strategy for other in lines) > 1
    label = strategy_label(line.strategy)
    return f"{label}, {line.start}" if several and line.start else label
