"""The CPU engine's unpack: 64 bools a word."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Bools (..., numel) of packed bits (..., bytes)."""
    bits = bits.contiguous()
    mask = bits.new_empty((*bits.shape[:-1], numel), dtype=torch.bool)
    samples = bits.shape[0] if bits.dim() == 2 else 1
    _cpu.unpack(bits.data_ptr(), samples, numel, mask.data_ptr(), torch.get_num_threads())
    return mask
