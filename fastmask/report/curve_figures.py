"""Trade-off curves, and what one knob does to density, source and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmask.report import metrics, paper
from fastmask.report.canvas import legend_columns, panels, settle
from fastmask.report.curves import Curve, Point, knob_label
from fastmask.report.labels import Label, place
from fastmask.report.metrics import Spread
from fastmask.report.palette import GRID, INK, MUTED, strategy_colour, strategy_label
from fastmask.report.rows import MASKED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# A strategy's knobs, in order; a legend tells which is which.
_LINES = (("-", "o"), ((0, (4, 2)), "s"), ((0, (1, 1.5)), "^"), ((0, (6, 2, 1, 2)), "D"))
_PAPER = {"source-start": "P", "source-end": "X", "random": "d"}


def tradeoff_curves(
    found: Sequence[Curve], own: Sequence[Point], published: bool, narrow: bool
) -> Figure:
    """Draw source gain against target change as knobs vary: all strategies in one panel, then each alone."""
    names = metrics.in_order((c.strategy for c in found), MASKED)
    shown = [names] if len(names) == 1 else [names, *([name] for name in names)]
    entries = len(found) + bool(own) + (len(_PAPER) if published else 0)
    figure, axes = panels(
        len(shown), narrow, 3.3, legend=0.3 + 0.2 * (entries if narrow else -(-entries // 3))
    )
    for ax, group in zip(axes, shown, strict=True):
        ax.axhline(0, color=MUTED, linewidth=1.0)
        ax.axvline(0, color=MUTED, linewidth=1.0)
        beside = (
            {start: paper.published_mean(start) for start in _PAPER}
            if published and "binary" in group
            else {}
        )
        _published(ax, beside)
        for curve in found:
            _curve(ax, curve, _style(found, curve), curve.strategy in group)
        for point in own:
            if point.strategy in group:
                _own(ax, point)
        alone = f"{strategy_label(group[0])}, each point at its value"
        ax.set_title("all strategies" if len(group) > 1 else alone)
        points = [point for curve in found for point in curve.points if curve.strategy in group]
        points += [point for point in own if point.strategy in group]
        cells = beside.values()
        ax.set_xlim(*_limits([p.change.mean for p in points] + [c.target_change for c in cells]))
        ax.set_ylim(*_limits([p.gain.mean for p in points] + [c.source_gain for c in cells]))
        ax.grid(color=GRID)
    for ax in axes[:: 1 if narrow else 2]:
        ax.set_ylabel("source gain (points)")
    for ax in axes[-1:] if narrow else axes[-2:]:
        ax.set_xlabel("target change (points of accuracy)")
    _legend(figure, found, own, published, narrow)
    settle(figure)
    for ax, group in zip(axes, shown, strict=True):
        if len(group) == 1:
            _label(ax, [curve for curve in found if curve.strategy in group], own)
    return figure


def knob_lines(
    found: Sequence[Curve],
    positive: Mapping[tuple[str, str], Spread],
    own: float | None,
    narrow: bool,
) -> Figure:
    """Draw what one knob does, on a log axis: density of the mask, then gain and change.

    Args:
        found: the curves of the knob, one a strategy.
        positive: share of logits above 0 by (strategy, setting), as far as known.
        own: the sweep's own value of the knob; None where its own settings lie on none of the curves.
        narrow: one column.
    """
    from matplotlib.lines import Line2D

    knob = found[0].knob
    figure, axes = panels(2, narrow, 2.9, legend=1.1 if narrow else 0.7)
    density, effect = axes
    for curve in found:
        colour = strategy_colour(curve.strategy)
        values = [point.value for point in curve.points]
        _line(density, values, [point.density for point in curve.points], colour, "-", "o")
        shares = [
            (point.value, share)
            for point in curve.points
            if (share := positive.get((point.strategy, point.setting))) is not None
        ]
        _line(density, [v for v, _ in shares], [s for _, s in shares], colour, ":", "x")
        _line(effect, values, [point.gain for point in curve.points], colour, "-", "o")
        _line(effect, values, [point.change for point in curve.points], colour, (0, (4, 2)), "s")
    density.set_ylim(0, 104)
    density.set_ylabel("share of the weights (%)")
    effect.axhline(0, color=MUTED, linewidth=1.0)
    effect.set_ylabel("points of accuracy")
    ticks = sorted({point.value for curve in found for point in curve.points})
    for ax in axes:
        if ticks[0] > 0:
            ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(knob)
        ax.grid(axis="y", color=GRID)
        if own is not None:
            ax.axvline(own, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=0.5)
    density.set_title("the mask")
    effect.set_title("against unmasked fine-tuning")
    names = [curve.strategy for curve in found]
    handles = [
        Line2D([], [], color=strategy_colour(name), linewidth=3, label=strategy_label(name))
        for name in names
    ]
    handles.append(_key("-", "o", "left: frozen; right: source gain"))
    if positive:
        handles.append(_key(":", "x", "left: logits above 0"))
    handles.append(_key((0, (4, 2)), "s", "right: target change"))
    if own is not None:
        handles.append(
            Line2D([], [], color=MUTED, linestyle=(0, (1, 2)), label="the sweep's own value")
        )
    across = legend_columns(figure, [str(handle.get_label()) for handle in handles], 3)
    figure.legend(handles=handles, loc="outside lower center", ncols=across)
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Room for markers and labels, and never a magnified nothing."""
    low, high = 100 * min(*values, -0.01), 100 * max(*values, 0.01)
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _style(found: Sequence[Curve], curve: Curve) -> tuple[Any, str]:
    knobs = [other.knob for other in found if other.strategy == curve.strategy]
    return _LINES[knobs.index(curve.knob) % len(_LINES)]


def _curve(ax: Axes, curve: Curve, style: tuple[Any, str], shown: bool) -> None:
    line, marker = style
    ax.plot(
        [100 * point.change.mean for point in curve.points],
        [100 * point.gain.mean for point in curve.points],
        color=strategy_colour(curve.strategy) if shown else GRID,
        linestyle=line,
        linewidth=1.5 if shown else 1.0,
        marker=marker if shown else "none",
        markersize=4.5,
        zorder=3 if shown else 1.2,
    )


def _own(ax: Axes, point: Point) -> None:
    ax.plot(
        100 * point.change.mean,
        100 * point.gain.mean,
        marker="*",
        markersize=13,
        color=strategy_colour(point.strategy),
        markeredgecolor=INK,
        markeredgewidth=0.6,
        zorder=4,
    )


def _published(ax: Axes, cells: Mapping[str, paper.Published]) -> None:
    for start, cell in cells.items():
        ax.plot(
            100 * cell.target_change,
            100 * cell.source_gain,
            marker=_PAPER[start],
            markersize=7,
            markerfacecolor="none",
            markeredgecolor=INK,
            linestyle="none",
            zorder=3.5,
        )


def _legend(
    figure: Figure, found: Sequence[Curve], own: Sequence[Point], published: bool, narrow: bool
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for curve in found:
        line, marker = _style(found, curve)
        handles.append(
            Line2D(
                [],
                [],
                color=strategy_colour(curve.strategy),
                linestyle=line,
                marker=marker,
                markersize=4.5,
                label=f"{strategy_label(curve.strategy)}: {knob_label(curve.knob)}",
            )
        )
    if own:
        handles.append(_star())
    for start, marker in _PAPER.items() if published else ():
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=marker,
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=INK,
                label=f"paper's binary, {start}",
            )
        )
    across = legend_columns(figure, [str(handle.get_label()) for handle in handles], 3)
    figure.legend(handles=handles, loc="outside lower center", ncols=across)


def _label(ax: Axes, found: Sequence[Curve], own: Sequence[Point]) -> None:
    """Label each curve's ends first: what lies between can be guessed."""
    at = [
        (100 * point.change.mean, 100 * point.gain.mean)
        for point in [*own, *(point for curve in found for point in curve.points)]
    ]
    labels = []
    for curve in found:
        ends = (curve.points[0], *curve.points[:0:-1][:1])
        for point in (*ends, *curve.points[1:-1]):
            labels.append(Label(100 * point.change.mean, 100 * point.gain.mean, f"{point.value:g}"))
    place(ax, labels, at)


def _line(
    ax: Axes,
    values: Sequence[float],
    spreads: Sequence[Spread],
    colour: str,
    line: Any,
    marker: str,
) -> None:
    if not values:
        return
    known = [spread.std for spread in spreads if spread.std is not None]
    ax.errorbar(
        values,
        [100 * spread.mean for spread in spreads],
        yerr=[100 * (spread.std or 0.0) for spread in spreads] if known else None,
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=4.5,
        elinewidth=0.8,
        capsize=2.0,
        alpha=0.9,
    )


def _key(line: Any, marker: str, label: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=MUTED, linestyle=line, marker=marker, markersize=4.5, label=label)


def _star() -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        marker="*",
        markersize=11,
        linestyle="none",
        color=MUTED,
        markeredgecolor=INK,
        markeredgewidth=0.6,
        label="the sweep's own settings",
    )
