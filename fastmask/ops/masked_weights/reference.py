"""Specification of masked_weights: select, never multiply, each weight by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.masked_conv2d.reference import laid_out
from fastmask.ops.masked_linear.reference import select


def masked_weights(weights: list[Tensor], active: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """where(active, W, 0) of each weight, in its own memory format, rounded to `dtype`."""
    chosen = []
    for weight, bits in zip(weights, active, strict=True):
        selected = select(weight.contiguous(), bits.unsqueeze(0)).to(dtype)
        chosen += laid_out(selected.contiguous(), weight)
    return chosen
