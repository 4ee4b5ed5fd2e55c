"""Figures 5 and 6: accuracy after fine-tuning, one panel a source, one group a target, one bar a strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastmask.report import metrics
from fastmask.report.canvas import legend_columns, panels
from fastmask.report.metrics import Spread, spread
from fastmask.report.palette import (
    GRID,
    INK,
    MUTED,
    strategy_colour,
    strategy_label,
    text_on,
    wrapped,
)
from fastmask.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 72.0


def source_bars(rows: Sequence[Row], narrow: bool) -> Figure:
    """Draw figure 5: source accuracy after fine-tuning on each target; a line marks it before."""
    names = [name for name in metrics.strategies(rows) if name != "scratch"]
    return _grouped(
        rows, names, lambda row: row.source_accuracy, "source accuracy (%)", True, narrow
    )


def target_bars(rows: Sequence[Row], narrow: bool) -> Figure:
    """Draw figure 6: target accuracy after fine-tuning, beside training on the target alone."""
    names = metrics.strategies(rows)
    return _grouped(
        rows, names, lambda row: row.target_accuracy, "target accuracy (%)", False, narrow
    )


def spread_note(rows: Sequence[Row]) -> str:
    """Say what bars and whiskers are."""
    cells = Counter((row.source, row.target, row.strategy, row.start) for row in rows)
    least, most = min(cells.values()), max(cells.values())
    if most == 1:
        return "bars: one seed (n = 1), hence no whiskers"
    seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds"
    return f"bars: mean of {seeds}; whiskers: ± 1 standard deviation"


def _grouped(
    rows: Sequence[Row],
    names: Sequence[str],
    value: Callable[[Row], float],
    label: str,
    before: bool,
    narrow: bool,
) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sources = metrics.sources(rows)
    figure, axes = panels(len(sources), narrow, 2.35, legend=0.75 + 0.15 * (len(names) // 5))
    inches = figure.get_figwidth() * (0.88 if narrow or len(sources) == 1 else 0.44)
    for ax, source in zip(axes, sources, strict=True):
        mine = [row for row in rows if row.source == source]
        _panel(ax, mine, names, value, inches)
        ax.set_title(f"source: {wrapped(source, 34, 1)}")
        if before and mine:
            ax.axhline(
                100 * spread(row.source_accuracy_before for row in mine).mean,
                color=INK,
                linewidth=1.0,
                linestyle=(0, (4, 2)),
                zorder=1.5,
            )
    for ax in axes[:: 1 if narrow else 2]:
        ax.set_ylabel(label)
    for ax in axes[-1:] if narrow else axes[-2:]:
        ax.set_xlabel("target it was fine-tuned on")
    figure.align_xlabels(axes)
    handles: list[Patch | Line2D] = [
        Patch(color=strategy_colour(name), label=strategy_label(name)) for name in names
    ]
    if before:
        handles.append(
            Line2D(
                [], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label="before fine-tuning"
            )
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(figure, [str(handle.get_label()) for handle in handles], len(handles)),
        title=spread_note(rows),
    )
    return figure


def _panel(
    ax: Axes,
    rows: Sequence[Row],
    names: Sequence[str],
    value: Callable[[Row], float],
    inches: float,
) -> None:
    targets = sorted({row.target for row in rows})
    step = 1.0 / (len(names) + 1.0)
    group = inches * _POINTS / max(len(targets), 1)
    for place, name in enumerate(names):
        cells = _cells(metrics.of(rows, name), targets, value)
        at = [i + (place - (len(names) - 1) / 2) * step for i, cell in enumerate(cells) if cell]
        found = [cell for cell in cells if cell]
        ax.bar(at, [100 * c.mean for c in found], width=step * 0.92, color=strategy_colour(name))
        whiskers = [(x, c) for x, c in zip(at, found, strict=True) if c.std is not None]
        if whiskers:
            ax.errorbar(
                [x for x, _ in whiskers],
                [100 * c.mean for _, c in whiskers],
                yerr=[100 * (c.std or 0.0) for _, c in whiskers],
                fmt="none",
                ecolor=INK,
                elinewidth=0.9,
                capsize=min(2.5, group * step / 4),
            )
        if group * step >= 8.5:
            for x, cell in zip(at, found, strict=True):
                _number(ax, x, 100 * cell.mean, text_on(strategy_colour(name)))
    ax.set_xticks(range(len(targets)), [wrapped(target, int(group / 5.4)) for target in targets])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(targets) - 0.5)
    ax.set_ylim(0, 104)
    ax.set_yticks(range(0, 101, 20))
    ax.grid(axis="y", color=GRID)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)


def _number(ax: Axes, x: float, percent: float, colour: str) -> None:
    """Write the height at the foot of a bar, upright, where whiskers and lines seldom come."""
    ax.text(
        x,
        2.5,
        f"{percent:.1f}",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=7.0,
        color=colour,
    )


def _cells(
    rows: Sequence[Row], targets: Sequence[str], value: Callable[[Row], float]
) -> list[Spread | None]:
    found: list[Spread | None] = []
    for target in targets:
        values = [value(row) for row in rows if row.target == target]
        found.append(spread(values) if values else None)
    return found
