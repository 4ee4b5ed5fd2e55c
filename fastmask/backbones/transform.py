"""From a picture to what a backbone reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask.errors import require

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Transform:
    """`(resize(picture) - mean) / std`, the whole picture straight to size x size, nothing cut off.

    Args:
        size: side in pixels.
        mean: of red, green and blue, on the scale 0-255.
        std: likewise.
        interpolation: Pillow's filter, which averages where it shrinks: nearest, bilinear, bicubic, lanczos.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __call__(self, picture: Any) -> Tensor:
        """Turn a uint8 tensor (3, H, W) or a Pillow image into float32 (3, size, size)."""
        return self.scaled(self.sized(picture))

    def sized(self, picture: Any) -> Tensor:
        """The first half of it: uint8 (3, size, size), a quarter of the bytes."""
        if not isinstance(picture, Tensor):
            picture = _to_tensor(picture.convert("RGB"))
        if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
            raise TypeError(
                f"picture: expected uint8 of shape (3, H, W), got {picture.dtype} of {tuple(picture.shape)}"
            )
        if picture.shape[1:] == (self.size, self.size):
            return picture
        require("PIL", extra="vision")
        from PIL import Image

        whole = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sampling = Image.Resampling[self.interpolation.upper()]
        return _to_tensor(whole.resize((self.size, self.size), sampling))

    def scaled(self, pictures: Tensor) -> Tensor:
        """The second half: uint8 (..., 3, size, size) as float32."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=pictures.device).view(3, 1, 1)
            for v in (self.mean, self.std)
        )
        return (pictures.float() - mean) / std

    def batch(self, pictures: Sequence[Any]) -> Tensor:
        """Transform and stack: float32 (n, 3, size, size)."""
        return torch.stack([self(picture) for picture in pictures])

    def describe(self) -> str:
        """One line that changes whenever the numbers do; part of the key of cached features."""
        return (
            f"RGB 0-255, whole picture to {self.size}x{self.size} ({self.interpolation}, Pillow), "
            f"minus {list(self.mean)} over {list(self.std)}"
        )


def _to_tensor(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
