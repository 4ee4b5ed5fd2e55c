"""Triton's unpack: eight bools for each byte, which is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch

BYTES = 256


@triton.jit
def _unpack(bits_ptr, mask_ptr, n, size, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    sample, first = packed.start_of_mask(blocks, BLOCK, WIDE)
    at = first + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    ones = packed.expand(tl.load(bits_ptr + sample * size + at, mask=at < size, other=0))
    tl.store(mask_ptr + sample * n + element, ones.to(tl.uint8), mask=element < n)


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Bools (..., numel) of packed bits (..., bytes)."""
    bits = bits.contiguous()
    mask = torch.empty((*bits.shape[:-1], numel), dtype=torch.bool, device=bits.device)
    if mask.numel() == 0:
        return mask
    size = bits.shape[-1]
    blocks = triton.cdiv(size, BYTES)
    with launch.on(bits):
        _unpack[(blocks * (mask.numel() // numel),)](
            bits,
            mask.view(torch.uint8),
            numel,
            size,
            blocks,
            BLOCK=BYTES,
            WIDE=launch.wide(size * 8),
            enable_fp_fusion=False,
        )
    return mask
