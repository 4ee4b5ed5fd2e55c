"""Specification of pack: bit e % 8 of byte e // 8, padded with 0 to whole 64-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._layout import packed_bytes


def pack(mask: Tensor, mu: float) -> Tensor:
    """Bits of a bool tensor, or of `mask > mu` for a floating one."""
    ones = mask if mask.dtype == torch.bool else mask > mu
    n = ones.numel()
    padded = ones.new_zeros(packed_bytes(n) * 8, dtype=torch.uint8)
    padded[:n] = ones.reshape(-1)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=ones.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)
