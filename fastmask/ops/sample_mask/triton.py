"""Triton's sample_mask: the reference's bits; a logit is read once for all samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, philox
from fastmask.ops._layout import packed_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128
# Samples up to which estimates cost fewer instructions than thresholds.
ESTIMATED = 2


@triton.jit
def _sample(
    logits_ptr,
    seed_ptr,
    bits_ptr,
    n,
    size,
    samples,
    stream,
    BLOCK: tl.constexpr,
    NEAR: tl.constexpr,
    WIDE: tl.constexpr,
):
    first = packed.start(BLOCK, WIDE)
    quad = first * 2 + tl.arange(0, 2 * BLOCK)
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    # Behind the end the threshold is 0 and so are the bits.
    logits = tl.load(logits_ptr + element, mask=element < n, other=float("-inf"))
    logits = logits.to(tl.float32)
    if NEAR is None:
        limit = philox.threshold(logits)
    seed = tl.load(seed_ptr)
    at = first + tl.arange(0, BLOCK)
    for sample in range(samples):
        k24 = philox.uniform24(seed, quad, sample, stream, WIDE)
        if NEAR is None:
            ones = k24 < limit
        else:
            ones = philox.drawn(logits, k24, NEAR)
        tl.store(bits_ptr + at, packed.collect(tl.reshape(ones, (BLOCK, 8))), mask=at < size)
        bits_ptr += size


def sample_mask(logits: Tensor, seed: Tensor, samples: int, stream: int) -> Tensor:
    """Sampled masks as packed bits (samples, bytes)."""
    logits = logits.contiguous()
    n = logits.numel()
    size = packed_bytes(n)
    bits = torch.empty((samples, size), dtype=torch.uint8, device=logits.device)
    if bits.numel() == 0:
        return bits
    # A stream travels as a tensor does, in 32 bits, so that no number of it compiles anew.
    with launch.on(logits):
        _sample[(triton.cdiv(size, BYTES),)](
            logits,
            seed,
            bits,
            n,
            size,
            samples,
            stream - 2**32 if stream >= 2**31 else stream,
            BLOCK=BYTES,
            # More samples share the thresholds.
            NEAR=philox.NEAR if samples <= ESTIMATED else None,
            WIDE=launch.wide(size * 8),
            enable_fp_fusion=False,
        )
    return bits
