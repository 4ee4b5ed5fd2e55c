"""How far the masks of two domains agree, against what chance would give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastmask.errors import MaskFileError
from fastmask.report import metrics
from fastmask.report.canvas import panels
from fastmask.report.mask_file import MaskFile
from fastmask.report.palette import INK, strategy_label, text_on, wrapped
from fastmask.report.rows import MASKED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light to dark from chance to the same mask; a step ends at each of these.
_ENDS = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
_STEPS = ("#eef2f7", "#c6d7ea", "#8fb4d9", "#4f86bd", "#1f5a96", "#0b3262")


@dataclass(frozen=True)
class Agreement:
    """Mean overlap of pairs of masks, and the mean of what independent masks as dense would have."""

    overlap: float
    chance: float

    @property
    def beyond_chance(self) -> float:
        """`(overlap - chance) / (1 - chance)`: 0 as independent masks, 1 the same mask."""
        return (self.overlap - self.chance) / (1.0 - self.chance) if self.chance < 1.0 else 0.0


@dataclass(frozen=True)
class Overlaps:
    """A strategy's masks; `cells` holds (source, source) in order of `sources`, the diagonal included.

    Between domains it is the mean over seeds, of masks of one seed; on the diagonal over pairs of seeds.
    """

    strategy: str
    sources: tuple[str, ...]
    cells: Mapping[tuple[str, str], Agreement]

    def mean(self, same: bool) -> Agreement | None:
        """The mean between domains, or of one domain from seed to seed."""
        return _mean(cell for (a, b), cell in self.cells.items() if (a == b) is same)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Agreement:
    """Compute `|a and b| / |a or b|`, and what two independent masks as dense would have.

    Of n entries, independent masks of densities p and q share `n p q` on average and cover
    `n (p + q - p q)`; their overlap is the quotient `p q / (p + q - p q)`, up to terms of order 1 / n. Two
    empty masks are the same mask: 1, and chance gives 1 as well.
    """
    either = np.count_nonzero(a | b)
    if not either:
        return Agreement(1.0, 1.0)
    p, q = np.count_nonzero(a) / a.size, np.count_nonzero(b) / b.size
    return Agreement(np.count_nonzero(a & b) / either, p * q / (p + q - p * q))


def overlaps(masks: Mapping[tuple[str, str, int], MaskFile]) -> list[Overlaps]:
    """Compare the masks of each strategy, all parameters together, where there are two or more.

    Raises:
        MaskFileError: masks of one run have other shapes, or a file is damaged.
    """
    found = []
    for strategy in metrics.in_order({name for _, name, _ in masks}, MASKED):
        mine = {(s, seed): mask for (s, name, seed), mask in masks.items() if name == strategy}
        bits = _bits(mine)
        sources = tuple(sorted({source for source, _ in mine}))
        seeds = sorted({seed for _, seed in mine})
        cells = {}
        for a in sources:
            for b in sources:
                pairs = combinations(seeds, 2) if a == b else zip(seeds, seeds, strict=True)
                both = [((a, i), (b, j)) for i, j in pairs if (a, i) in bits and (b, j) in bits]
                mean = _mean(overlap(bits[first], bits[second]) for first, second in both)
                if mean is not None:
                    cells[a, b] = mean
        if cells:
            found.append(Overlaps(strategy, sources, cells))
    return found


def overlap_maps(found: Sequence[Overlaps], narrow: bool) -> Figure:
    """Draw a heat map a strategy: the overlap of each two sources, chance below it in smaller type."""
    from matplotlib.patches import Patch

    n = max(len(each.sources) for each in found)
    across = 1 if narrow else min(len(found), 3 if n <= 5 else 2)
    side = (3.4 if narrow else 9.0 / across - 0.4) / n
    side = min(side, 0.62)
    figure, axes = panels(
        len(found), narrow, n * side + 0.75, columns=across, legend=1.1 if narrow else 0.75
    )
    for ax, each in zip(axes, found, strict=True):
        _map(ax, each, side)
    labels = [f"{'≤' if i == 0 else 'to'} {100 * end:.0f} %" for i, end in enumerate(_ENDS)]
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=INK, linewidth=0.4, label=label)
            for colour, label in zip(_STEPS, labels, strict=True)
        ],
        loc="outside lower center",
        ncols=3 if narrow else 6,
        title="overlap beyond chance, of what lies between chance and the same mask",
    )
    return figure


def _map(ax: Axes, each: Overlaps, side: float) -> None:
    names = [wrapped(source, 12, 3 if side > 0.4 else 2) for source in each.sources]
    for row, a in enumerate(each.sources):
        for column, b in enumerate(each.sources):
            cell = each.cells.get((a, b))
            step = 0 if cell is None else _step(cell.beyond_chance)
            ax.fill(
                [column, column + 1, column + 1, column],
                [row, row, row + 1, row + 1],
                facecolor="none" if cell is None else _STEPS[step],
                edgecolor=INK,
                linewidth=1.2 if a == b else 0.3,
                zorder=3 if a == b else 2,
                clip_on=False,
            )
            if cell is None:
                ax.text(column + 0.5, row + 0.5, "–", ha="center", va="center", zorder=4)
                continue
            colour = text_on(_STEPS[step])
            size = min(8.5, 15 * side)
            ax.text(
                column + 0.5, row + 0.4, f"{cell.overlap:.2f}", fontsize=size, color=colour,
                ha="center", va="center", zorder=4,
            )  # fmt: skip
            ax.text(
                column + 0.5, row + 0.76, f"{cell.chance:.2f}", fontsize=0.75 * size, color=colour,
                ha="center", va="center", zorder=4,
            )  # fmt: skip
    n = len(each.sources)
    ax.set_xlim(0, n)
    ax.set_ylim(n, 0)
    ax.set_aspect("equal")
    centres = [i + 0.5 for i in range(n)]
    ax.set_xticks(centres, names, rotation=90 if n > 3 or side < 0.6 else 0, fontsize=7.5)
    ax.set_yticks(centres, names, fontsize=7.5)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(strategy_label(each.strategy))


def _step(beyond: float) -> int:
    return next((i for i, end in enumerate(_ENDS) if beyond <= end), len(_ENDS) - 1)


def _bits(masks: Mapping[tuple[str, int], MaskFile]) -> dict[tuple[str, int], NDArray[np.bool_]]:
    first = next(iter(masks.values()))
    for mask in masks.values():
        if mask.shapes != first.shapes:
            raise MaskFileError(
                f"{mask.path}: expected the shapes of {first.path.name}, {first.shapes}, "
                f"got {mask.shapes}"
            )
    return {
        key: np.concatenate([mask.frozen(name).ravel() for name in mask.shapes])
        for key, mask in masks.items()
    }


def _mean(found: Iterable[Agreement]) -> Agreement | None:
    cells = list(found)
    if not cells:
        return None
    return Agreement(
        math.fsum(cell.overlap for cell in cells) / len(cells),
        math.fsum(cell.chance for cell in cells) / len(cells),
    )
