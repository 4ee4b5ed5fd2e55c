"""Figures 4 and 7: the trained weights with µ ± σ, and the masks as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmask.report.canvas import panels
from fastmask.report.mask_file import MaskFile
from fastmask.report.palette import FREE, FROZEN, GRID, INK, MUTED, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Bins to k standard deviations, so that edges fall on µ ± kσ and a bin is frozen or free as a whole.
_PER_SIGMA = 6
_REACH = 6
MOST_TILES = 12
_LABEL_INCHES = 0.2


def weight_histograms(masks: Sequence[MaskFile], narrow: bool, k: float = 1.0) -> Figure:
    """Draw figure 4: the classifier's weights after training on each source, with µ and µ ± kσ."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, axes = panels(len(masks), narrow, 2.3)
    for ax, mask in zip(axes, masks, strict=True):
        _histogram(ax, mask.weight(mask.last).ravel().astype(np.float64), k)
        ax.set_title(f"source: {wrapped(mask.source, 34, 1)}")
    for ax in axes[:: 1 if narrow else 2]:
        ax.set_ylabel("weights")
    reach = f"µ ± {_sigmas(k)}"
    figure.legend(
        handles=[
            Patch(color=FREE, label=f"within {reach}: free under naive"),
            Patch(color=FROZEN, label="beyond: frozen under naive"),
            Line2D([], [], color=INK, linewidth=1.2, label="µ"),
            Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label=reach),
        ],
        loc="outside lower center",
        ncols=1 if narrow else 4,
    )
    return figure


def _sigmas(k: float) -> str:
    return "σ" if k == 1.0 else f"{k:g} σ"


def _histogram(ax: Axes, values: NDArray[np.float64], k: float) -> None:
    mean = float(values.mean()) if values.size else 0.0
    sigma = float(values.std(ddof=1)) if values.size > 1 else 0.0
    if sigma > 0.0:
        unit = k * sigma
        scaled = (values - mean) / unit
        low = max(math.floor(scaled.min()), -_REACH)
        high = min(math.ceil(scaled.max()), _REACH)
        edges = np.arange(low * _PER_SIGMA, high * _PER_SIGMA + 1) / _PER_SIGMA
        counts = np.histogram(scaled, edges)[0]
        for colour, inside in ((FREE, True), (FROZEN, False)):
            shown = np.where((np.abs(edges[:-1] + edges[1:]) / 2 < 1.0) == inside, counts, 0)
            ax.stairs(shown, mean + unit * edges, fill=True, color=colour)
        ax.stairs(counts, mean + unit * edges, color=MUTED, linewidth=0.6)
        for side in (-unit, unit):
            ax.axvline(mean + side, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
        said = f"naive freezes {100 * float((np.abs(scaled) > 1).mean()):.1f} %"
        beyond = int(values.size - counts.sum())
        if beyond:
            said += f"; {beyond} weights lie beyond ± {_sigmas(_REACH * k)}"
    else:
        ax.bar([mean], [values.size], width=0.1, color=FREE)
        said = "all weights are equal"
    ax.axvline(mean, color=INK, linewidth=1.2)
    ax.set_xlabel(f"value of the weight (µ {mean:.4g}, σ {sigma:.4g})\n{said}".replace("-", "−"))
    ax.margins(x=0.01)
    ax.grid(axis="y", color=GRID)
    ax.ticklabel_format(axis="y", style="plain")


@dataclass(frozen=True)
class _Tiles:
    """Rows of a matrix, each folded to a tile of the same size; -1 is ground, 0 free, 1 frozen."""

    height: int
    width: int
    tiles: list[NDArray[np.int8]]


def fold(matrix: NDArray[np.bool_]) -> _Tiles:
    """Fold each row of n entries to a tile of about 5:4, line by line, padded with ground."""
    n = matrix.shape[1]
    height = max(1, round(math.sqrt(n * 0.8)))
    # A height that divides n needs no padding, but not at the price of a ribbon: at most 2:1.
    exact = [h for h in range(math.ceil(math.sqrt(n / 2)), math.isqrt(n) + 1) if n % h == 0]
    height = min(exact, key=lambda h: abs(h - height), default=height)
    width = max(1, -(-n // height))
    tiles = []
    for row in matrix:
        flat = np.full(height * width, -1, np.int8)
        flat[:n] = row
        tiles.append(flat.reshape(height, width))
    return _Tiles(height, width, tiles)


def mask_pictures(masks: Sequence[MaskFile], narrow: bool) -> Figure:
    """Draw figure 7: the mask of each source, one tile a class, frozen and free in two colours."""
    from matplotlib.patches import Patch

    shown, columns = 1, 1
    for mask in masks:
        shown = max(shown, min(_matrix(mask).shape[0], MOST_TILES))
    short = all(len(name) <= 8 for mask in masks for name in mask.classes)
    one_line = 4 if narrow else (10 if short else 7)
    columns = min(shown, one_line if narrow or shown <= one_line else -(-shown // 2))
    lines = -(-shown // columns)
    tile_inches = (4.3 if narrow else 10.2) / columns
    folded = fold(_matrix(masks[0])[:1])
    aspect = folded.height / folded.width
    tile_inches = min(tile_inches, 1.7)
    height = 0.35 + lines * (tile_inches * aspect + _LABEL_INCHES)
    figure, axes = panels(len(masks), narrow, height, columns=1, legend=0.5)
    gap = max(1, math.ceil(_LABEL_INCHES / tile_inches * folded.width))
    # A letter of 7.5 points is about 0.065 inch wide; the share takes six of them.
    letters = int(tile_inches / 0.065) - 6
    for ax, mask in zip(axes, masks, strict=True):
        _mosaic(ax, mask, shown, columns, gap, letters)
    figure.legend(
        handles=[
            Patch(color=FROZEN, label="frozen: kept for the source"),
            Patch(color=FREE, label="free: fine-tuned on the target"),
        ],
        loc="outside lower center",
        ncols=1 if narrow else 2,
    )
    return figure


def _matrix(mask: MaskFile) -> NDArray[np.bool_]:
    frozen = mask.frozen(mask.last)
    return frozen.reshape(frozen.shape[0] if frozen.ndim > 1 else 1, -1)


def _mosaic(ax: Axes, mask: MaskFile, shown: int, columns: int, gap_y: int, letters: int) -> None:
    frozen = _matrix(mask)
    folded = fold(frozen[:shown])
    gap_x = max(2, folded.width // 8)
    lines = -(-len(folded.tiles) // columns)
    ground = np.full(
        (lines * (folded.height + gap_y), columns * (folded.width + gap_x) - gap_x), -1, np.int8
    )
    for i, tile in enumerate(folded.tiles):
        top = (i // columns) * (folded.height + gap_y) + gap_y
        left = (i % columns) * (folded.width + gap_x)
        ground[top : top + folded.height, left : left + folded.width] = tile
        name = mask.classes[i] if len(mask.classes) == len(frozen) else f"row {i}"
        ax.text(
            left,
            top - 0.06 * gap_y,
            f"{wrapped(name, letters, 1)}: {100 * float(frozen[i].mean()):.0f} %",
            fontsize=7.5,
            ha="left",
            va="bottom",
        )
    ax.imshow(_coloured(ground), interpolation="none", aspect="equal", extent=_extent(ground))
    ax.set_axis_off()
    more = f", first {shown} of {len(frozen)} rows" if len(frozen) > shown else ""
    ax.set_title(
        f"source: {wrapped(mask.source, 30, 1)}  ({100 * float(frozen.mean()):.1f} % frozen{more})",
        pad=2.0,
    )


def _extent(ground: NDArray[Any]) -> tuple[float, float, float, float]:
    return (0.0, float(ground.shape[1]), float(ground.shape[0]), 0.0)


def _coloured(ground: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Enlarge by whole numbers (a browser would blur small pictures) and colour; ground is clear."""
    times = max(1, 1600 // max(ground.shape))
    large = np.kron(ground, np.ones((times, times), np.int8))
    picture = np.zeros((*large.shape, 4), np.uint8)
    for value, colour in ((0, FREE), (1, FROZEN)):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        picture[large == value] = (red, green, blue, 255)
    return picture
