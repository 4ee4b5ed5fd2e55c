"""Triton's restore_frozen_: frozen entries by selection of integers, one launch a tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch
from fastmask.ops._tables import written_back

BYTES = 128

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _restore(param_ptr, saved_ptr, frozen_ptr, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    in_n = element < n
    frozen = packed.expand(tl.load(frozen_ptr + at, mask=at * 8 < n, other=0))
    theta = tl.load(param_ptr + element, mask=in_n, other=0)
    saved = tl.load(saved_ptr + element, mask=in_n, other=0)
    # All lanes are written: stores under a mask of single elements would be of single elements.
    tl.store(param_ptr + element, tl.where(frozen, saved, theta), mask=in_n)


def restore_frozen_(params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None]) -> None:
    """theta = saved where frozen."""
    held = [i for i, bits in enumerate(frozen) if bits is not None and params[i].numel() > 0]
    with written_back([params[i] for i in held]) as (some,):
        for i, param in zip(held, some, strict=True):
            kind = _INTEGERS[param.element_size()]
            n, bits = param.numel(), frozen[i]
            assert bits is not None
            with launch.on(param):
                _restore[(triton.cdiv(n, BYTES * 8),)](
                    param.view(kind),
                    saved[i].contiguous().view(kind),
                    bits.contiguous(),
                    n,
                    BLOCK=BYTES,
                    WIDE=launch.wide(n),
                    enable_fp_fusion=False,
                )
