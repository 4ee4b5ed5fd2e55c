"""The CPU engine's popcount."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu


def popcount(bits: Tensor) -> Tensor:
    """Ones of each packed mask (..., bytes), int64 (...)."""
    bits = bits.contiguous()
    ones = bits.new_empty(bits.shape[:-1], dtype=torch.int64)
    threads = torch.get_num_threads()
    _cpu.popcount(bits.data_ptr(), ones.numel(), bits.shape[-1], ones.data_ptr(), threads)
    return ones
