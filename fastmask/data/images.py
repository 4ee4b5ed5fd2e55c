"""Image files of any kind, as 8-bit RGB, or a sentence that says what is wrong with one."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.errors import DataError, require

# A picture of 100 million pixels takes 300 MB once decoded; a file that declares more is refused unread.
MAX_PIXELS = 100_000_000


def fault(content: bytes) -> str | None:
    """What the file's header tells is wrong with it, None where it opens; pixels are not decoded."""
    if not content:
        return "empty file"
    try:
        _open(content)
    except DataError as error:
        return str(error)
    return None


def decode(content: bytes) -> Tensor:
    """Decode an image file to uint8 RGB (3, H, W), upright.

    EXIF rotation is applied; of an animation the first frame is taken; transparent parts lie on white;
    16-bit grey keeps its upper 8 bits; CMYK and palettes are converted.

    Raises:
        DataError: the file is empty, truncated, no image, too large, or holds floating-point pixels.
    """
    if not content:
        raise DataError("empty file")
    image = _open(content)
    from PIL import ImageOps

    try:
        image = _eight_bit_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    # Pillow's decoders raise what they like on damaged files; every failure is reported by file name.
    except Exception as error:
        raise DataError(f"cannot be decoded ({error})") from error
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def read(path: str | os.PathLike[str]) -> Tensor:
    """Decode the image file at `path`; see `decode`."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error
    return decode(content)


def _open(content: bytes) -> Any:
    require("PIL", extra="vision")
    from PIL import Image, UnidentifiedImageError

    if content.startswith(b"version https://git-lfs"):
        raise DataError("a git-LFS pointer, not the picture")
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise DataError(f"declares too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise DataError("not an image, or damaged in its first bytes") from error
    except Exception as error:
        raise DataError(f"cannot be opened ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"declares {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def _eight_bit_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "F":
        raise DataError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DataError("32-bit pixels beyond 16 bits, whose range is not known")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
