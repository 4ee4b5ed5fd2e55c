"""Pictures of glyphs: shapes from the fonts that matplotlib ships, warped, inked and coloured."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.errors import DataError, require

SIZE = 32
# Shapes are warped at twice the final size and averaged down, which keeps thin strokes whole.
_FINE = 2 * SIZE
_BOX = 52

# Typeface -> cuts (font file, code point of its digit zero). The cuts of one typeface resemble each other.
_OBLIQUE = ("", "-Bold", "-Oblique", "-BoldOblique")
_ITALIC = ("", "-Bold", "-Italic", "-BoldItalic")
_STIX = ("", "Bol", "Italic", "BolIta")
TYPEFACES: dict[str, tuple[tuple[str, int], ...]] = {
    "DejaVu Sans": tuple((f"DejaVuSans{cut}.ttf", 0x30) for cut in _OBLIQUE),
    "DejaVu Sans Mono": tuple((f"DejaVuSansMono{cut}.ttf", 0x30) for cut in _OBLIQUE),
    "DejaVu Serif": tuple((f"DejaVuSerif{cut}.ttf", 0x30) for cut in _ITALIC),
    "STIX": tuple((f"STIXGeneral{cut}.ttf", 0x30) for cut in _STIX),
    "Computer Modern": (("cmr10.ttf", 0x30), ("cmb10.ttf", 0x30), ("cmti10.ttf", 0x30)),
    "Computer Modern Sans": (("cmss10.ttf", 0x30),),
    "Computer Modern Typewriter": (("cmtt10.ttf", 0x30),),
    "double-struck": tuple((f"{font}.ttf", 0x1D7D8) for font in ("STIXGeneral", "DejaVuSans", "DejaVuSerif")),
    "STIX Sans": (("STIXGeneral.ttf", 0x1D7E2), ("STIXGeneral.ttf", 0x1D7EC)),
    "STIX Mono": (("STIXGeneral.ttf", 0x1D7F6),),
}  # fmt: skip
LETTER_FONTS = tuple(file for cuts in TYPEFACES.values() for file, zero in cuts if zero == 0x30)


@lru_cache(maxsize=4096)
def glyph(file: str, character: str) -> np.ndarray:
    """The coverage of one character, float32 in [0, 1], (64, 64), its box centred and 52 pixels long."""
    require("PIL", extra="vision")
    from PIL import Image, ImageDraw, ImageFont

    path = Path(require("matplotlib", extra="vision").get_data_path()) / "fonts" / "ttf" / file
    if not path.is_file():
        raise DataError(f"the digits are drawn in fonts that matplotlib ships; {path} is missing")
    # BASIC layout: the optional shaping library changes positions, and single glyphs need none.
    font = ImageFont.truetype(str(path), 160, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, font=font, fill=255)
    drawn = canvas.crop(canvas.getbbox())
    scale = _BOX / max(drawn.size)
    drawn = drawn.resize(
        (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))),
        Image.Resampling.BOX,
    )
    shape = np.zeros((_FINE, _FINE), np.float32)
    y, x = (_FINE - drawn.height) // 2, (_FINE - drawn.width) // 2
    shape[y : y + drawn.height, x : x + drawn.width] = np.asarray(drawn, np.float32) / 255
    return shape


def uniform(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """float32 numbers in [low, high)."""
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def grain(rng: np.random.Generator, n: int, cells: int, channels: int = 1) -> Tensor:
    """Normal noise on a grid of cells x cells, smooth between them: (n, channels, 32, 32)."""
    noise = torch.from_numpy(rng.normal(0, 1, (n, channels, cells, cells)).astype(np.float32))
    if cells == SIZE:
        return noise
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic", align_corners=False)


def colour(rng: np.random.Generator, n: int, low: float, high: float) -> Tensor:
    """One RGB colour a picture, (n, 3, 1, 1)."""
    return uniform(rng, (n, 3, 1, 1), low, high)


def warp(
    shapes: Tensor,
    rng: np.random.Generator,
    *,
    degrees: float,
    shear: float,
    scale: tuple[float, float],
    shift: float,
    wave: float = 0.0,
) -> Tensor:
    """Turn, shear, scale, shift and bend shapes (n, 1, 64, 64), each by its own random amounts."""
    n = len(shapes)
    angle = uniform(rng, (n,), -degrees, degrees) * (math.pi / 180)
    lean = uniform(rng, (n,), -shear, shear)
    wide, high = uniform(rng, (n,), *scale), uniform(rng, (n,), *scale)
    right, down = uniform(rng, (n,), -shift, shift), uniform(rng, (n,), -shift, shift)
    rows = (angle.cos() / wide, (angle.sin() + lean) / wide, right,
            -angle.sin() / high, angle.cos() / high, down)  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [*shapes.shape], align_corners=False)
    if wave:
        bend = torch.from_numpy(rng.normal(0, wave, (n, 2, 4, 4)).astype(np.float32))
        bend = F.interpolate(bend, (_FINE, _FINE), mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(shapes, grid, align_corners=False)


def outline(shapes: Tensor) -> Tensor:
    """The edges of shapes: what one pixel more and one pixel less of ink differ by."""
    return F.max_pool2d(shapes, 3, 1, 1) + F.max_pool2d(-shapes, 3, 1, 1)


def finish(shapes: Tensor) -> Tensor:
    """Halve (n, 1, 64, 64) to (n, 1, 32, 32)."""
    return F.avg_pool2d(shapes, 2)


def paint(coverage: Tensor, ink: Tensor, ground: Tensor) -> Tensor:
    """`ground` where coverage is 0, `ink` where it is 1."""
    return ground * (1 - coverage) + ink * coverage


def to_bytes(pictures: Tensor) -> Tensor:
    """[0, 1] to uint8."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
