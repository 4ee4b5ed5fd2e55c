"""The CUDA engine's popcount: one launch for all masks; the sums of its blocks are integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import place


def popcount(bits: Tensor) -> Tensor:
    """Ones of each packed mask (..., bytes), int64 (...)."""
    bits = bits.contiguous()
    ones = torch.zeros(bits.shape[:-1], dtype=torch.int64, device=bits.device)
    _cuda.popcount(bits.data_ptr(), ones.numel(), bits.shape[-1], ones.data_ptr(), *place(bits))
    return ones
