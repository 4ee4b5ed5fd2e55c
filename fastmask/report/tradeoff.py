"""Source gain against target change: what each strategy pays for what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmask.report import metrics
from fastmask.report.canvas import legend_columns, panels
from fastmask.report.metrics import Spread
from fastmask.report.palette import GRID, INK, MUTED, strategy_colour, strategy_label, wrapped
from fastmask.report.rows import MASKED, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p", "d")


def tradeoff(rows: Sequence[Row], narrow: bool) -> Figure:
    """Draw source gain against target change: one point a strategy and source, a large one their mean."""
    from matplotlib.lines import Line2D

    names = [name for name in metrics.strategies(rows) if name in MASKED]
    sources = metrics.sources(rows)
    entries = len(names) + (len(sources) if len(sources) > 1 else 0)
    figure, (ax,) = panels(1, narrow, 3.5, legend=0.35 + 0.2 * -(-entries // 2))
    ax.axhline(0, color=MUTED, linewidth=1.0)
    ax.axvline(0, color=MUTED, linewidth=1.0)
    for name in names:
        gain, change = metrics.source_gain(rows, name), metrics.target_change(rows, name)
        for source in gain if len(sources) > 1 else ():
            ax.plot(
                100 * change[source].mean,
                100 * gain[source].mean,
                marker=_MARKERS[sources.index(source) % len(_MARKERS)],
                markersize=5.5,
                alpha=0.75,
                markeredgewidth=0,
                color=strategy_colour(name),
            )
        _mean_point(
            ax,
            metrics.mean_target_change(rows, name),
            metrics.mean_source_gain(rows, name),
            strategy_colour(name),
        )
    ax.set_xlabel("target change against unmasked fine-tuning (points of accuracy)")
    ax.set_ylabel("source gain (points of accuracy)")
    ax.margins(0.12)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -1.0), max(high, 1.0))
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -1.0), max(high, 1.0))
    ax.grid(color=GRID)
    handles = [
        Line2D(
            [],
            [],
            marker="*",
            markersize=11,
            linestyle="none",
            color=strategy_colour(name),
            markeredgecolor=INK,
            markeredgewidth=0.6,
            label=strategy_label(name) + (", mean" if len(sources) > 1 else ""),
        )
        for name in names
    ] + [
        Line2D(
            [],
            [],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5.5,
            linestyle="none",
            color=MUTED,
            label=f"source {wrapped(source, 18 if narrow else 28, 1)}",
        )
        for i, source in enumerate(sources if len(sources) > 1 else ())
    ]
    across = legend_columns(figure, [str(handle.get_label()) for handle in handles], 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=across)
    return figure


def _mean_point(ax: Axes, change: Spread | None, gain: Spread | None, colour: str) -> None:
    if change is None or gain is None:
        return
    ax.errorbar(
        100 * change.mean,
        100 * gain.mean,
        xerr=None if change.std is None else 100 * change.std,
        yerr=None if gain.std is None else 100 * gain.std,
        marker="*",
        markersize=15,
        color=colour,
        ecolor=INK,
        elinewidth=0.9,
        capsize=2.5,
        markeredgecolor=INK,
        markeredgewidth=0.6,
        zorder=4,
    )
