"""The tables for a page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fastmask.report.curves import Curve, Point
from fastmask.report.metrics import Spread, in_order
from fastmask.report.palette import strategy_label
from fastmask.report.rows import MASKED, Row
from fastmask.report.tables import (
    DIGITS,
    name_of,
    percent,
    signed,
    strategy_table,
    table_1,
)


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
        + f"<td>{difference(line.gain)}</td><td>{difference(line.change)}</td></tr>"
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
                body += f"<td{' class=best' if best else ''}>{difference(value)}</td>"
                if known:
                    there = signed(getattr(line.published, field)) if line.published else ""
                    body += f'<td class="paper">{there}</td>'
            body += "</tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def curves_html(found: Sequence[Curve], own: Sequence[Point]) -> str:
    """The points of trade-off curves for a page, after each strategy at the sweep's own settings."""
    head = (
        '<tr><th scope="col">Setting</th><th scope="col">Frozen %</th>'
        '<th scope="col">Source gain</th><th scope="col">Target change</th></tr>'
    )
    body = ""
    for name in in_order({curve.strategy for curve in found}, MASKED):
        label = html.escape(strategy_label(name))
        body += f'<tr class="group"><th colspan="4" scope="rowgroup">{label}</th></tr>'
        for point in own:
            body += _point("the sweep’s own", point) if point.strategy == name else ""
        for curve in found:
            for point in curve.points if curve.strategy == name else ():
                body += _point(f"{curve.knob} = {point.value:g}", point)
    return (
        "<details><summary>The same in numbers</summary>"
        f'<div class="wide"><table class="numbers"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


def _point(name: str, point: Point) -> str:
    return (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{percent(point.density)}</td>'
        f"<td>{difference(point.gain)}</td><td>{difference(point.change)}</td></tr>"
    )


def difference(value: Spread | None) -> str:
    """A difference in a cell: mean ± std over seeds, below it the interval, and whether that is noise."""
    if value is None:
        return "–"
    if value.ci95 is None or value.std is None:
        return signed(value.mean)
    low, high = map(signed, value.ci95)
    noise = " <span>· noise</span>" if value.within_noise else ""
    return (
        f'{signed(value.mean)} <span class="pm">±\u00a0{value.std:.{DIGITS}f}</span>'
        f'<span class="ci"><span>{low} to</span> <span>{high}</span>{noise}</span>'
    )
