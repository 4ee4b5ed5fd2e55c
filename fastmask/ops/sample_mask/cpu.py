"""The CPU engine's sample_mask: the reference's bits, 64 elements at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._layout import packed_bytes

DTYPES = (torch.float32, torch.bfloat16)


def sample_mask(logits: Tensor, seed: Tensor, samples: int, stream: int) -> Tensor:
    """Sampled masks as packed bits (samples, bytes)."""
    logits = logits.contiguous()
    n = logits.numel()
    bits = logits.new_empty((samples, packed_bytes(n)), dtype=torch.uint8)
    kind, key = int(logits.dtype == torch.bfloat16), int(seed) % 2**64
    _cpu.sample_mask(
        logits.data_ptr(), kind, n, key, samples, stream, bits.data_ptr(), torch.get_num_threads()
    )
    return bits
