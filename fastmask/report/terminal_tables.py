"""The tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmask.report import metrics
from fastmask.report.metrics import Spread
from fastmask.report.rows import Row
from fastmask.report.tables import (
    name_of,
    percent,
    signed,
    signed_spread,
    strategy_table,
    table_1,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_MARK = "~"
_NOISE = f"{_MARK} within noise: the 95 % confidence interval over seeds contains 0"


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
        caption_justify="left",
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
            *(_with_interval(value) for value in (line.gain, line.change)),
        )
    differences = [value for line in lines for value in (line.gain, line.change)]
    if any(value is not None and value.ci95 for value in differences):
        table.caption = "[95 % confidence interval over seeds]" + (
            f"; {_MARK} contains 0: within noise" if any(map(_is_noise, differences)) else ""
        )
    return table


def _with_interval(value: Spread | None) -> Text:
    """A difference, and below it its interval."""
    from rich.text import Text

    text = Text(signed_spread(value))
    if value is not None and value.ci95 is not None:
        low, high = map(signed, value.ci95)
        text.append(f"\n{_MARK + ' ' if value.within_noise else ''}[{low}, {high}]", style="dim")
    return text


def _is_noise(value: Spread | None) -> bool:
    return value is not None and value.within_noise is True


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
        caption_justify="left",
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
                mark = f"{_MARK} " if value.within_noise else ""
                cells.append(Text(mark + signed_spread(value), style="bold" if best else ""))
                if known:
                    there = signed(getattr(line.published, field)) if line.published else ""
                    cells.append(Text(there))
            table.add_row(*cells, end_section=i == len(group) - 1)
    if any(
        line.gain.within_noise or line.change.within_noise for group in groups for line in group
    ):
        table.caption = _NOISE
    return table
