"""From a run folder to its figures and its page."""

from __future__ import annotations

from html import escape
from os import PathLike
from pathlib import Path

from fastmask.errors import require
from fastmask.report import atomic, canvas, html
from fastmask.report.canvas import Drawing
from fastmask.report.figures import drawings
from fastmask.report.run_folder import read_run


def render(run_dir: str | PathLike[str]) -> Path:
    """Draw figures and `report.html` of a run folder from what it holds.

    Args:
        run_dir: a folder with results.csv, config.json, environment.json, masks/ and, unless an older version
            wrote it, masks.csv; nothing else is read.

    Returns:
        The path of `report.html`; `figures/` beside it holds each figure as PNG and SVG.

    Raises:
        RunFolderError: a file is missing or damaged, or the folder cannot be written to.
        MaskFileError: a mask file is missing or damaged; the message names it.
        MissingPackage: matplotlib is not installed (extra `report`).
    """
    require("matplotlib", extra="report")
    path = Path(run_dir)
    folder = read_run(path)
    with canvas.style():
        drawn = [_draw(path / "figures", drawing) for drawing in drawings(folder)]
    report = path / "report.html"
    atomic.write(report, html.page(folder, drawn).encode("utf-8"))
    return report


def _draw(folder: Path, drawing: Drawing) -> tuple[Drawing, str, str]:
    """Write a figure's files; return it with its wide and its narrow form for the page."""
    alt = escape(drawing.alt, quote=True)
    wide = canvas.settle(drawing.draw(False))
    atomic.write(folder / f"{drawing.name}.png", canvas.png(wide))
    file = canvas.svg(wide)
    atomic.write(folder / f"{drawing.name}.svg", file)
    narrow = canvas.settle(drawing.draw(True))
    return (
        drawing,
        canvas.inline(file, wide, f"{drawing.name}-w-", alt),
        canvas.inline(canvas.svg(narrow), narrow, f"{drawing.name}-n-", alt),
    )
