"""Triton's pack: one byte of bits for eight elements, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch
from fastmask.ops._layout import packed_bytes

DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)
BYTES = 256


@triton.jit
def _pack(mask_ptr, bits_ptr, level, n, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    values = tl.load(mask_ptr + element, mask=element < n, other=0).to(tl.float32)
    ones = (values > level) & (element < n)
    tl.store(bits_ptr + at, packed.collect(ones), mask=at < size)


def pack(mask: Tensor, mu: float) -> Tensor:
    """Bits of a bool tensor, or of `mask > mu` for a floating one."""
    mask = mask.contiguous()
    size = packed_bytes(mask.numel())
    bits = torch.empty(size, dtype=torch.uint8, device=mask.device)
    if size == 0:
        return bits
    # torch compares in the scores' dtype, to which it rounds mu; float32 holds all of them.
    level = 0.0
    if mask.dtype != torch.bool:
        level = torch.tensor(mu, dtype=mask.dtype, device="cpu").item()
    source = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    with launch.on(mask):
        _pack[(triton.cdiv(size, BYTES),)](
            source,
            bits,
            float(level),
            mask.numel(),
            size,
            BLOCK=BYTES,
            WIDE=launch.wide(size * 8),
            enable_fp_fusion=False,
        )
    return bits
