"""Colours, names and drawing style that all figures share."""

from __future__ import annotations

import hashlib
import re
from typing import Any

# Okabe and Ito's colours: told apart with every common kind of colour blindness. Binary is green and
# unmasked the quiet one, as readers of the paper expect.
_STRATEGIES = {
    "none": ("#8a8a94", "unmasked"),
    "naive": ("#e69f00", "naive"),
    "editor": ("#56b4e9", "editor"),
    "binary": ("#009e73", "binary"),
    "kl": ("#0072b2", "kl"),
    "lowrank": ("#d55e00", "low rank"),
    "magnitude": ("#b8a800", "magnitude"),
    "random": ("#a0714f", "random"),
    "scratch": ("#cc79a7", "target alone"),
}
_OTHERS = ("#7d6bc4", "#c0392b", "#4d8f9c")

# The two ends of viridis, as in the paper's figure 7.
FROZEN = "#fde725"
FREE = "#5b2a86"

# The page swaps these three for its own colours, so that figures follow light and dark.
INK = "#1b1b1f"
MUTED = "#6a6a75"
GRID = "#dcdce2"

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9.0,
    "legend.title_fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",
    "svg.hashsalt": "fastmask",
    "text.usetex": False,
    "text.parse_math": False,
}


def strategy_colour(name: str) -> str:
    """Colour of a strategy, the same in every figure of every run."""
    if name in _STRATEGIES:
        return _STRATEGIES[name][0]
    return _OTHERS[hashlib.sha256(name.encode()).digest()[0] % len(_OTHERS)]


def strategy_label(name: str) -> str:
    """What a reader calls a strategy."""
    return _STRATEGIES[name][1] if name in _STRATEGIES else name


def text_on(colour: str) -> str:
    """Dark or light text, whichever is told from a colour more easily (luminance of ITU-R BT.709)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    # Contrast to white is 1.05 / (b + 0.05), to black (b + 0.05) / 0.05: equal at b = 0.18.
    return "#101014" if bright > 0.18 else "#fafafc"


def wrapped(name: str, width: int, lines: int = 3) -> str:
    """Break a name after `_`, `-` or a blank at `width` characters; past `lines` end with `…`."""
    width = max(width, 4)
    rows = [""]
    for piece in re.findall(r"[^_\-\s]*[_\-\s]?", name):
        while len(rows[-1]) + len(piece.rstrip()) > width:
            if rows[-1]:
                rows.append("")
            else:
                rows[-1], piece = piece[:width], piece[width:]
        rows[-1] += piece
    rows = [row.strip() for row in rows if row.strip()]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1] + "…"]
    return "\n".join(rows)
