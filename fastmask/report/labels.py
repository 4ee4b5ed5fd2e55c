"""Numbers beside points, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmask.report.palette import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = 7.0
# Width of a digit and height of a line, in font sizes.
_DIGIT, _LINE = 0.64, 1.1
# From a point to its label, in points: first beside the point, then around it.
_PLACES = ((5, 3), (-5, 3), (5, -3), (-5, -3), (0, 6), (0, -6), (7, 0), (-7, 0))
_MARKER = 3.0


@dataclass(frozen=True)
class Label:
    """A text beside a point of the data."""

    x: float
    y: float
    text: str


def place(ax: Axes, labels: Sequence[Label], points: Sequence[tuple[float, float]]) -> None:
    """Write labels where they cover no point and no other label; the first ones have the first choice.

    A label without a free place is left out. The figure must have been laid out.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    dot = figure.dpi / 72
    ground = ax.get_window_extent()
    taken = [
        (x - _MARKER * dot, y - _MARKER * dot, x + _MARKER * dot, y + _MARKER * dot)
        for x, y in (ax.transData.transform(point) for point in points)
    ]
    for label in labels:
        x, y = ax.transData.transform((label.x, label.y))
        width, height = len(label.text) * _SIZE * _DIGIT * dot, _SIZE * _LINE * dot
        for right, up in _PLACES:
            left = x + right * dot - width * (0.0 if right > 0 else 1.0 if right < 0 else 0.5)
            foot = y + up * dot - height * (0.0 if up > 3 else 1.0 if up < -3 else 0.5)
            box = (left, foot, left + width, foot + height)
            inside = (
                ground.x0 <= box[0]
                and ground.y0 <= box[1]
                and box[2] <= ground.x1
                and box[3] <= ground.y1
            )
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                ax.annotate(
                    label.text,
                    (label.x, label.y),
                    xytext=(
                        (left + width / 2 - x) / dot,
                        (foot + height / 2 - y) / dot,
                    ),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=_SIZE,
                    color=INK,
                )
                break


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
