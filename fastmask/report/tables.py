"""Table 1 and the table of strategies: numbers once, shown in a terminal or on a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmask.report import metrics, paper
from fastmask.report.metrics import Spread
from fastmask.report.palette import strategy_label
from fastmask.report.rows import Row

if TYPE_CHECKING:
    from rich.table import Table

# Of a difference as printed; starts that look equal are not told apart by bold type.
_DIGITS = 3


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
        gains = [round(gain.mean, _DIGITS) for _, gain, _ in found]
        changes = [round(change.mean, _DIGITS) for _, _, change in found]
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
    return f"{value:+.{_DIGITS}f}".replace("-", "−")


def percent(value: Spread | None) -> str:
    """A share of 1 in percent: `83.1`."""
    return "–" if value is None else f"{100 * value.mean:.1f}"


def signed_spread(value: Spread | None) -> str:
    """A difference with its spread over seeds: `+0.031 ± 0.004`, or without it for one seed."""
    if value is None:
        return "–"
    return signed(value.mean) + ("" if value.std is None else f" ±\u00a0{value.std:.{_DIGITS}f}")


def name_of(line: StrategyLine, lines: Sequence[StrategyLine]) -> str:
    """The strategy, with its start where it ran with several."""
    several = sum(other.strategy == line.strategy for other in lines) > 1
    label = strategy_label(line.strategy)
    return f"{label}, {line.start}" if several and line.start else label


def strategies_text(rows: Sequence[Row]) -> Table:
    """The table of strategies for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    lines = strategy_table(rows)
    before = percent(metrics.level(rows, lambda row: row.source_accuracy_before))
    table = Table(
        title=f"All strategies, accuracies in % (source before fine-tuning: {before})",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy")
    for heading in (
        "frozen",
        "source",
        "target",
        "source gain",
        "target change",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            Text(name_of(line, lines)),
            percent(line.density),
            percent(line.after),
            percent(line.target),
            signed_spread(line.gain),
            signed_spread(line.change),
        )
    return table


def table_1_text(rows: Sequence[Row]) -> Table | None:
    """Table 1 for a terminal; None where the binary mask cannot be compared."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    groups = table_1(rows)
    if not groups:
        return None
    known = any(line.published for group in groups for line in group)
    table = Table(
        title="Binary mask against unmasked fine-tuning" + (" (paper: published)" if known else ""),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("source")
    table.add_column("start")
    for heading in ("source gain", "target change"):
        table.add_column(heading, justify="right", no_wrap=True)
        if known:
            table.add_column("paper", justify="right", style="dim", no_wrap=True)
    for group in groups:
        for i, line in enumerate(group):
            name = "" if i else ("mean" if line.source is None else line.source)
            cells = [Text(name), Text(line.start)]
            for value, best, field in (
                (line.gain, line.best_gain, "source_gain"),
                (line.change, line.best_change, "target_change"),
            ):
                cells.append(Text(signed_spread(value), style="bold" if best else ""))
                if known:
                    there = signed(getattr(line.published, field)) if line.published else ""
                    cells.append(Text(there))
            table.add_row(*cells, end_section=i == len(group) - 1)
    return table


def strategies_html(rows: Sequence[Row]) -> str:
    """The table of strategies for a page."""
    head = (
        '<tr><th scope="col">Strategy</th><th scope="col">Frozen %</th>'
        '<th scope="col" class="spare">Source before %</th><th scope="col">Source after %</th>'
        '<th scope="col">Target %</th><th scope="col">Source gain</th>'
        '<th scope="col">Target change</th></tr>'
    )
    lines = strategy_table(rows)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name_of(line, lines))}</th>'
        + f'<td>{percent(line.density)}</td><td class="spare">{percent(line.before)}</td>'
        + f"<td>{percent(line.after)}</td><td>{percent(line.target)}</td>"
        + f"<td>{_cell(line.gain)}</td><td>{_cell(line.change)}</td></tr>"
        for line in lines
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def table_1_html(rows: Sequence[Row]) -> str:
    """Table 1 for a page, the published values beside it; empty where nothing can be compared."""
    groups = table_1(rows)
    if not groups:
        return ""
    known = any(line.published for group in groups for line in group)
    paper_head = '<th scope="col" class="paper">paper</th>' if known else ""
    head = (
        '<tr><th scope="col">Start of the free weights</th>'
        f'<th scope="col">Source gain</th>{paper_head}'
        f'<th scope="col">Target change</th>{paper_head}</tr>'
    )
    columns = 5 if known else 3
    body = ""
    for group in groups:
        source = group[0].source
        title = "Mean over sources" if source is None else f"Source: {html.escape(source)}"
        body += f'<tr class="group"><th colspan="{columns}" scope="rowgroup">{title}</th></tr>'
        for line in group:
            body += f'<tr><th scope="row">{html.escape(line.start)}</th>'
            for value, best, field in (
                (line.gain, line.best_gain, "source_gain"),
                (line.change, line.best_change, "target_change"),
            ):
                body += f"<td{' class=best' if best else ''}>{_cell(value)}</td>"
                if known:
                    there = signed(getattr(line.published, field)) if line.published else ""
                    body += f'<td class="paper">{there}</td>'
            body += "</tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _cell(value: Spread | None) -> str:
    if value is None:
        return "–"
    less = "" if value.std is None else f' <span class="pm">±\u00a0{value.std:.{_DIGITS}f}</span>'
    return f"{signed(value.mean)}{less}"
