"""What a mask alone knows of its source: accuracy under W, W * B and W * (1 - B)."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastmask.report import metrics
from fastmask.report.canvas import panels
from fastmask.report.curves import of_masks
from fastmask.report.mask_rows import MaskRow
from fastmask.report.metrics import Spread, spread
from fastmask.report.palette import FREE, FROZEN, GRID, INK, MUTED, strategy_label, wrapped
from fastmask.report.rows import MASKED
from fastmask.report.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNDER: tuple[tuple[str, str, Callable[[MaskRow], float]], ...] = (
    ("#8a8a94", "all trained weights, W", lambda row: row.source_accuracy),
    (FROZEN, "the frozen ones alone, W·B", lambda row: row.kept_accuracy),
    (FREE, "the free ones alone, W·(1−B)", lambda row: row.inverted_accuracy),
)


def mask_alone(rows: Sequence[MaskRow], classes: int, narrow: bool) -> Figure:
    """Draw source accuracy with all weights, the frozen ones alone and the free ones alone.

    Args:
        rows: masks at the sweep's own settings.
        classes: how many there are, for the line of chance; 0 where that is not known.
        narrow: for a narrow page.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = metrics.in_order({row.strategy for row in rows}, MASKED)
    figure, (ax,) = panels(1, narrow, 3.0, legend=1.2 if narrow else 0.9)
    inches = figure.get_figwidth() * 0.86
    for place, (colour, _, value) in enumerate(_UNDER):
        for i, name in enumerate(names):
            _bar(ax, i + (place - 1) * 0.27, rows, name, value, colour)
    if classes:
        ax.axhline(100 / classes, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=3)
    width = int(inches * 72 / len(names) / 5.4)
    labels = [wrapped(strategy_label(name), width, 2) for name in names]
    ax.set_xticks(range(len(names)), labels)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylim(0, 104)
    ax.set_yticks(range(0, 101, 20))
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("source accuracy (%)")
    ax.grid(axis="y", color=GRID)
    ax.spines["left"].set_visible(False)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=colour, edgecolor=MUTED, linewidth=0.6, label=label)
        for colour, label, _ in _UNDER
    ]
    if len({row.source for row in rows}) > 1:
        handles.append(
            Line2D(
                [], [], linestyle="none", marker="o", markersize=3.5, color=INK, label="one source"
            )
        )
    if classes:
        handles.append(
            Line2D(
                [], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2)),
                label=f"chance, 1 of {classes} classes",
            )
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 2)
    return figure


def mask_alone_html(rows: Sequence[MaskRow]) -> str:
    """The same in numbers, for a page."""
    head = "".join(f'<th scope="col">{under}, %</th>' for under in ("W", "W·B", "W·(1−B)"))
    body = "".join(
        f'<tr><th scope="row">{html.escape(strategy_label(name))}</th>'
        + "".join(f"<td>{_cell(of_masks(rows, name, '', value))}</td>" for _, _, value in _UNDER)
        + "</tr>"
        for name in metrics.in_order({row.strategy for row in rows}, MASKED)
    )
    return (
        '<div class="wide"><table><thead><tr><th scope="col">Strategy</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Spread | None) -> str:
    if value is None or value.std is None:
        return percent(value)
    return f'{percent(value)} <span class="pm">±\u00a0{100 * value.std:.1f}</span>'


def _bar(
    ax: Axes,
    at: float,
    rows: Sequence[MaskRow],
    name: str,
    value: Callable[[MaskRow], float],
    colour: str,
) -> None:
    mean = of_masks(rows, name, "", value)
    if mean is None:
        return
    ax.bar([at], [100 * mean.mean], width=0.25, color=colour, edgecolor=MUTED, linewidth=0.6)
    if mean.std is not None:
        ax.errorbar(
            [at], [100 * mean.mean], yerr=[100 * mean.std],
            fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.5, zorder=3.5,
        )  # fmt: skip
    mine = [row for row in rows if row.strategy == name]
    sources = sorted({row.source for row in mine})
    for i, source in enumerate(sources if len(sources) > 1 else ()):
        ax.plot(
            at + 0.16 * ((i + 0.5) / len(sources) - 0.5),
            100 * spread(value(row) for row in mine if row.source == source).mean,
            marker="o",
            markersize=3.5,
            color=INK,
            markeredgecolor="#fafafc",
            markeredgewidth=0.5,
            zorder=4,
        )
