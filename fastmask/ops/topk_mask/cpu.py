"""The CPU engine's topk_mask: radix selection instead of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._layout import packed_bytes
from fastmask.ops.topk_mask.reference import kept

DTYPES = (torch.float32, torch.bfloat16)


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """Packed bits (bytes,) of the k largest scores; NaN ranks with -inf."""
    scores = scores.contiguous()
    n = scores.numel()
    bits = scores.new_empty(packed_bytes(n), dtype=torch.uint8)
    _cpu.topk_mask(
        scores.data_ptr(),
        int(scores.dtype == torch.bfloat16),
        n,
        kept(n, density),
        bits.data_ptr(),
        torch.get_num_threads(),
    )
    return bits
