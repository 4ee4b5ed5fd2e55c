"""The CPU engine's pack: 64 comparisons a word."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._layout import packed_bytes

DTYPES = (torch.bool, torch.float32, torch.bfloat16)


def pack(mask: Tensor, mu: float) -> Tensor:
    """Bits of a bool tensor, or of `mask > mu` for a floating one."""
    mask = mask.contiguous()
    n, threads = mask.numel(), torch.get_num_threads()
    bits = mask.new_empty(packed_bytes(n), dtype=torch.uint8)
    if mask.dtype == torch.bool:
        _cpu.pack_bools(mask.data_ptr(), n, bits.data_ptr(), threads)
    else:
        # torch compares in the scores' dtype, to which it rounds mu.
        level = torch.tensor(mu, dtype=mask.dtype, device="cpu").item()
        kind = int(mask.dtype == torch.bfloat16)
        _cpu.pack_scores(mask.data_ptr(), kind, level, n, bits.data_ptr(), threads)
    return bits
