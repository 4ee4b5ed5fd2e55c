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
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


class PictureError(DataError):
    """A file is no picture that can be used; `kind` is one word for the sort of fault."""

    def __init__(self, said: str, kind: str = "damaged") -> None:
        super().__init__(said)
        self.kind = kind


def fault(content: bytes) -> str | None:
    """What the file's header tells is wrong with it, None where it opens; pixels are not decoded."""
    try:
        _open(content)
    except PictureError as error:
        return str(error)
    return None


def decode(content: bytes) -> Tensor:
    """Decode an image file to uint8 RGB (3, H, W), upright.

    EXIF rotation is applied; of an animation the first frame is taken; transparent parts lie on white;
    16-bit grey keeps its upper 8 bits; CMYK and palettes are converted.

    Raises:
        PictureError: the file is empty, truncated, no image, too large, or holds floating-point pixels.
    """
    image = _open(content)
    from PIL import ImageOps

    try:
        image = _eight_bit_rgb(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    # Pillow's decoders raise what they like on damaged files; every failure is reported by file name.
    except Exception as error:
        raise PictureError(f"cannot be decoded ({error})") from error
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def traits(content: bytes) -> tuple[str, list[str]]:
    """The format of a picture that decodes, and what of it `decode` has to treat.

    Of "cmyk", "colours" (LAB, HSV, YCbCr), "palette", "sixteen" (bits), "transparent", "frames" (several) and
    "rotated" (by EXIF).
    """
    image = _open(content)
    modes = {"CMYK": "cmyk", "P": "palette", "PA": "palette"}
    found = [modes[image.mode]] if image.mode in modes else []
    if image.mode in ("LAB", "HSV", "YCbCr"):
        found.append("colours")
    if image.mode.startswith("I"):
        found.append("sixteen")
    if _transparent(image):
        found.append("transparent")
    if _several(image):
        found.append("frames")
    if image.getexif().get(0x0112, 1) in range(2, 9):
        found.append("rotated")
    return image.format or "", found


def contents(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file, or a PictureError that says why they cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror or error})", "unreadable") from error


def read(path: str | os.PathLike[str]) -> Tensor:
    """Decode the image file at `path`; see `decode`."""
    return decode(contents(path))


def _open(content: bytes) -> Any:
    require("PIL", extra="vision")
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise PictureError("empty file", "empty")
    if content.startswith(b"version https://git-lfs"):
        raise PictureError("a git-LFS pointer, not the picture", "pointer")
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise PictureError(f"declares too many pixels ({error})", "large") from error
    except UnidentifiedImageError as error:
        raise PictureError("not an image, or damaged in its first bytes", "foreign") from error
    except Exception as error:
        raise PictureError(f"cannot be opened ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"declares {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}", "large"
        )
    return image


def _eight_bit_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "F":
        raise PictureError("floating-point pixels, whose range is not known", "range")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PictureError("32-bit pixels beyond 16 bits, whose range is not known", "range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if _transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _transparent(image: Any) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _several(image: Any) -> bool:
    try:
        return getattr(image, "is_animated", False)
    # Formats look for a second frame to answer, and raise what they like where it is damaged.
    except Exception:
        return True
