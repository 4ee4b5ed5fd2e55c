"""Matplotlib figures to PNG, SVG and SVG that lies inside a page and takes on its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmask.errors import require
from fastmask.report.palette import GRID, INK, MUTED, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 200
# Widths in inches: a page of about 1100 px, and a telephone of about 360 px.
WIDE, NARROW = 11.0, 4.6


@dataclass(frozen=True)
class Drawing:
    """A figure with its words; `draw(narrow)` gives the figure for a wide or a narrow page.

    `table` is the same in numbers, as HTML, where the figure cannot show them all.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[bool], Figure]
    table: str = ""


@contextmanager
def style() -> Iterator[None]:
    """Draw and save under the shared style, whatever the user's matplotlib settings are."""
    matplotlib = require("matplotlib", extra="report")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def panels(
    n: int, narrow: bool, height: float, columns: int = 2, legend: float = 0.75
) -> tuple[Figure, list[Axes]]:
    """Lay out n equal panels, `columns` a row (one on a narrow page), `height` inches each."""
    figure_module = require("matplotlib.figure", extra="report")
    layout_module = require("matplotlib.layout_engine", extra="report")
    across = 1 if narrow else min(n, columns)
    rows = -(-n // across)
    width = NARROW if narrow else (WIDE * 0.6 if across < columns else WIDE)
    engine = layout_module.ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.03, wspace=0.03)
    figure: Figure = figure_module.Figure(figsize=(width, rows * height + legend), layout=engine)
    axes: list[Axes] = list(figure.subplots(rows, across, squeeze=False).flat)
    for spare in axes[n:]:
        spare.remove()
    return figure, axes[:n]


def legend_columns(figure: Figure, labels: Sequence[str], most: int) -> int:
    """How many legend entries go beside each other: a letter of 9 points is about 0.075 inch wide."""
    widest = 0.55 + 0.075 * max((len(label) for label in labels), default=0)
    return max(1, min(most, int(figure.get_figwidth() / widest)))


def settle(figure: Figure) -> Figure:
    """Lay the figure out once; else every saving lays it out, and draws it, a second time."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def png(figure: Figure) -> bytes:
    """Draw on white."""
    return _saved(figure, "png", facecolor="white", dpi=PNG_DPI)


def svg(figure: Figure) -> bytes:
    """Draw on white as a file of its own; equal figures give equal bytes."""
    return _saved(figure, "svg", facecolor="white", metadata={"Date": None})


def inline(drawn: bytes, figure: Figure, prefix: str, alt: str) -> str:
    """Fit an SVG file into a page: no ground, text in the page's colour, ids with `prefix`."""
    text = drawn.decode("utf-8")
    text = text[text.index("<svg") :]
    # The figure's own patch, its white ground, is drawn first.
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    wanted = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in wanted else "", text)
    text = re.sub(r' id="([^"]+)"', rf' id="{prefix}\1"', text)
    text = re.sub(r' d="([^"]+)"', lambda m: f' d="{_rounded(m[1])}"', text)
    text = text.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    for colour, name in ((INK, "currentColor"), (MUTED, "var(--muted)"), (GRID, "var(--grid)")):
        text = text.replace(colour, name)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # 1.4 px a point keeps text near the page's own size; beyond that a small figure would be blown up.
    limit = round(figure.get_figwidth() * 72 * 1.4)
    head = f'<svg role="img" aria-label="{alt}" style="max-width:{limit}px"'
    return text.replace("<svg", head, 1).strip()


def _rounded(path: str) -> str:
    """Two decimals of a point are finer than any screen and half the size."""
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", " ".join(path.split()))


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **options)
    return stream.getvalue()
