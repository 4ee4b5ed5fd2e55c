"""Specification of unpack: the bits of each mask as bools."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Bools (..., numel) of packed bits (..., bytes)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (bits.unsqueeze(-1) >> shifts) & 1
    return ones.flatten(-2)[..., :numel].bool()
