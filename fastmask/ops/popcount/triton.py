"""Triton's popcount: sums of blocks, then torch's sum of integers, the same in every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch

WORDS = 2048


@triton.jit
def _popcount(words_ptr, sums_ptr, size, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    sample, first = packed.start_of_mask(blocks, BLOCK, WIDE)
    at = first + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + sample * size + at, mask=at < size, other=0).to(
        tl.uint32, bitcast=True
    )
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    ones = ((word * 0x01010101) >> 24).to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(ones))


def popcount(bits: Tensor) -> Tensor:
    """Ones of each packed mask (..., bytes), int64 (...)."""
    if bits.shape[-1] % 4 != 0:
        # Bytes that are no whole mask have no words.
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 4))
    bits = bits.contiguous()
    if bits.data_ptr() % 4 != 0:
        bits = bits.clone()
    samples = bits.shape[0] if bits.dim() == 2 else 1
    size = bits.shape[-1] // 4
    blocks = triton.cdiv(size, WORDS)
    sums = torch.empty((samples, blocks), dtype=torch.int32, device=bits.device)
    if sums.numel() > 0:
        with launch.on(bits):
            _popcount[(blocks * samples,)](
                bits.view(torch.int32),
                sums,
                size,
                blocks,
                BLOCK=WORDS,
                WIDE=launch.wide(size),
                enable_fp_fusion=False,
            )
    return sums.sum(dim=1, dtype=torch.int64).view(bits.shape[:-1])
