"""Small image files, no two alike."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encoded(seed: int, kind: str = "PNG", side: int = 12) -> bytes:
    """An image file of random pixels that depends on the seed alone."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
