"""Four domains of the ten digits, drawn on the spot from what installs with the dependencies."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.backbones import drawing
from fastmask.data.domain_set import DomainSet
from fastmask.errors import require

CLASSES = tuple("0123456789")
# 80 pictures of each digit and domain: scikit-learn has at least 174 originals of each digit, which
# leaves each handwritten domain originals of its own; ten typefaces give eight pictures each.
EACH = 80
SEED = 2308
_INK = 9.0
_THRESHOLD = 0.45


@lru_cache(maxsize=4)
def load(test_fraction: float = 0.3) -> DomainSet:
    """Draw the four domains: `handwritten`, `chalk`, `printed` and `neon`, 800 pictures of 32 x 32 each.

    Handwritten and chalk show scikit-learn's digits, each original in one of them; printed and neon show the
    digits of ten typefaces. A group is an original, or a digit of a typeface in all its cuts and in
    both domains: no split separates it.
    """
    numbers = torch.arange(10).repeat_interleave(EACH)
    originals, images = _originals()
    pen, chalk = originals[:, :EACH].reshape(-1), originals[:, EACH:].reshape(-1)
    shapes, typefaces = _typefaces()
    drawn = {
        "handwritten": _handwritten(_strokes(images[pen])),
        "chalk": _chalk(_strokes(images[chalk])),
        "printed": _printed(shapes),
        "neon": _neon(shapes),
    }
    groups = {
        "handwritten": tuple(f"original {i}" for i in pen),
        "chalk": tuple(f"original {i}" for i in chalk),
        "printed": typefaces,
        "neon": typefaces,
    }
    return DomainSet(
        "digits",
        CLASSES,
        dict.fromkeys(drawn, numbers),
        groups,
        lambda domain, row: drawn[domain][row],
        {domain: hashlib.sha256(x.numpy().tobytes()).hexdigest() for domain, x in drawn.items()},
        lambda domain, row: f"{domain}, picture {row} ({groups[domain][row]})",
        test_fraction=test_fraction,
    )


def _originals() -> tuple[np.ndarray, np.ndarray]:
    """Rows of scikit-learn's digits, (10, 2 * EACH) without repetition, and all its images (1797, 8, 8)."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    rng = np.random.default_rng(SEED)
    rows = [rng.permutation(np.flatnonzero(digits.target == d))[: 2 * EACH] for d in range(10)]
    return np.stack(rows), digits.images.astype(np.float32) / 16


def _strokes(images: np.ndarray) -> Tensor:
    """Smooth strokes (n, 1, 64, 64) through 8 x 8 images: enlarged, then steepened into an edge."""
    large = F.interpolate(
        torch.from_numpy(images)[:, None], (52, 52), mode="bicubic", align_corners=False
    )
    return F.pad(torch.sigmoid((large - _THRESHOLD) * _INK), (6, 6, 6, 6))


def _typefaces() -> tuple[Tensor, tuple[str, ...]]:
    """Shapes (800, 1, 64, 64) of each digit in ten typefaces, their cuts in turn, and their groups."""
    shapes, groups = [], []
    for digit in range(10):
        for face, cuts in drawing.TYPEFACES.items():
            for turn in range(EACH // len(drawing.TYPEFACES)):
                file, zero = cuts[turn % len(cuts)]
                shapes.append(drawing.glyph(file, chr(zero + digit)))
                groups.append(f"{digit} of {face}")
    return torch.from_numpy(np.stack(shapes))[:, None], tuple(groups)


def _handwritten(strokes: Tensor) -> Tensor:
    """Coloured ink on light paper."""
    rng, n = np.random.default_rng(SEED + 1), len(strokes)
    strokes = drawing.warp(strokes, rng, degrees=8, shear=0.1, scale=(0.85, 1.05), shift=0.08)
    paper, ink = drawing.colour(rng, n, 0.86, 1.0), drawing.colour(rng, n, 0.0, 0.3)
    painted = drawing.paint(drawing.finish(strokes), ink, paper)
    return drawing.to_bytes(painted + 0.03 * drawing.grain(rng, n, drawing.SIZE))


def _chalk(strokes: Tensor) -> Tensor:
    """Light strokes that skip over the grain of a dark, smudged board."""
    rng, n = np.random.default_rng(SEED + 2), len(strokes)
    strokes = drawing.warp(strokes, rng, degrees=8, shear=0.1, scale=(0.8, 1.05), shift=0.08)
    rough = F.interpolate(drawing.grain(rng, n, drawing.SIZE), (64, 64), mode="nearest")
    strokes = drawing.finish(strokes * torch.sigmoid(2 * rough + 1.6))
    green = torch.tensor([0.8, 1.2, 1.0]).view(3, 1, 1)
    board = drawing.colour(rng, n, 0.08, 0.25) * green + 0.07 * drawing.grain(rng, n, 4)
    board = board + 0.03 * drawing.grain(rng, n, drawing.SIZE)
    return drawing.to_bytes(drawing.paint(strokes, drawing.colour(rng, n, 0.75, 1.0), board))


def _printed(shapes: Tensor) -> Tensor:
    """Black type on white paper."""
    rng, n = np.random.default_rng(SEED + 3), len(shapes)
    shapes = drawing.warp(shapes, rng, degrees=6, shear=0.1, scale=(0.75, 1.05), shift=0.12)
    paper, ink = drawing.colour(rng, n, 0.92, 1.0), drawing.colour(rng, n, 0.0, 0.15)
    painted = drawing.paint(drawing.finish(shapes), ink, paper)
    return drawing.to_bytes(painted + 0.02 * drawing.grain(rng, n, drawing.SIZE))


def _neon(shapes: Tensor) -> Tensor:
    """Glowing coloured outlines in a dark street."""
    rng, n = np.random.default_rng(SEED + 4), len(shapes)
    shapes = drawing.warp(shapes, rng, degrees=12, shear=0.15, scale=(0.75, 1.05), shift=0.12)
    edge = drawing.outline(shapes)
    tube = drawing.finish((edge + 0.6 * F.avg_pool2d(edge, 9, 1, 4)).clamp(0, 1))
    light = drawing.colour(rng, n, 0.1, 1.0)
    light = light / light.amax(1, keepdim=True)
    street = drawing.colour(rng, n, 0.0, 0.25) + 0.06 * drawing.grain(rng, n, 4, channels=3)
    painted = drawing.paint(tube, light, street)
    return drawing.to_bytes(painted + 0.03 * drawing.grain(rng, n, drawing.SIZE))
