"""The CUDA engine's pack: one byte of bits for eight elements, read 16 bytes at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import KINDS, place
from fastmask.ops._layout import packed_bytes

DTYPES = (torch.bool, *KINDS)


def pack(mask: Tensor, mu: float) -> Tensor:
    """Bits of a bool tensor, or of `mask > mu` for a floating one."""
    mask = mask.contiguous()
    n = mask.numel()
    bits = torch.empty(packed_bytes(n), dtype=torch.uint8, device=mask.device)
    if mask.dtype == torch.bool:
        _cuda.pack_bools(mask.data_ptr(), n, bits.data_ptr(), *place(mask))
    else:
        # torch compares in the scores' dtype, to which it rounds mu; float32 holds all of them.
        level = torch.tensor(mu, dtype=mask.dtype, device="cpu").item()
        kind = KINDS[mask.dtype]
        _cuda.pack_scores(mask.data_ptr(), kind, level, n, bits.data_ptr(), *place(mask))
    return bits
