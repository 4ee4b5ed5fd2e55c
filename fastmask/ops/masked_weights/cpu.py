"""The CPU engine's masked_weights: each weight selected in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.masked_conv2d.reference import laid_out
from fastmask.ops.masked_linear.cpu import select

DTYPES = (torch.float32, torch.bfloat16)


def masked_weights(weights: list[Tensor], active: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """where(active, W, 0) of each weight, in its own memory format, rounded to `dtype`."""
    chosen = []
    for weight, bits in zip(weights, active, strict=True):
        chosen += laid_out(select(weight, bits.unsqueeze(0)).to(dtype), weight)
    return chosen
