"""Device functions over packed bits: one byte of mask stands beside the eight elements it speaks of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """First index of this program's block, in 64 bits where WIDE: 32 would overflow."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    return block * BLOCK


@triton.jit
def start_of_mask(blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """This program's mask, of `blocks` each, and the first index of its block; one axis has no limit."""
    program = tl.program_id(0)
    block = program % blocks
    if WIDE:
        block = block.to(tl.int64)
    return (program // blocks).to(tl.int64), block * BLOCK


@triton.jit
def expand(packed):
    """Bytes (..., B) as bools (..., B, 8), the eight of a byte in one thread where the layout lets them."""
    return ((tl.expand_dims(packed.to(tl.int32), -1) >> tl.arange(0, 8)) & 1) != 0


@triton.jit
def collect(ones):
    """Bools (..., B, 8) as bytes (..., B)."""
    return tl.sum(ones.to(tl.int32) << tl.arange(0, 8), axis=-1).to(tl.uint8)


@triton.jit
def gather(bits_ptr, element, in_tensor):
    """The bit of each element, where rows do not start on a byte."""
    packed = tl.load(bits_ptr + (element >> 3), mask=in_tensor, other=0).to(tl.int32)
    return ((packed >> (element & 7).to(tl.int32)) & 1) != 0
