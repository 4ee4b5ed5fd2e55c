"""Triton's masked_sgd_: weight, gradient, momentum and bits in one pass, one launch a tensor.

The step is computed in float32 from values of the tensors' dtype and rounded when it is stored. Frozen
entries are selected from what was read, so that they keep their bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, sgd
from fastmask.ops._tables import written_back

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128


@triton.jit
def _step(
    param_ptr,
    grad_ptr,
    buf_ptr,
    frozen_ptr,
    lr_ptr,
    lr,
    momentum,
    weight_decay,
    undamped,
    n,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    in_n = element < n
    theta = tl.load(param_ptr + element, mask=in_n, other=0.0)
    g = tl.load(grad_ptr + element, mask=in_n, other=0.0).to(tl.float32)
    if frozen_ptr is not None:
        frozen = packed.expand(tl.load(frozen_ptr + at, mask=at * 8 < n, other=0))
    held = None
    if buf_ptr is not None:
        held = tl.zeros_like(theta)
        if not FIRST:
            held = tl.load(buf_ptr + element, mask=in_n, other=0.0)
    moved, buf = sgd.stepped(
        theta, g, held, lr_ptr, lr, momentum, weight_decay, undamped, NESTEROV, MAXIMIZE, FIRST
    )
    if buf_ptr is not None:
        if frozen_ptr is not None:
            buf = tl.where(frozen, held, buf)
        tl.store(buf_ptr + element, buf, mask=in_n)
    if frozen_ptr is not None:
        moved = tl.where(frozen, theta, moved)
    tl.store(param_ptr + element, moved, mask=in_n)


def masked_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    frozen: list[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """theta, buf unchanged where frozen; elsewhere buf = mu buf + (1 - damp) g, theta -= lr d."""
    rate = launch.number(lr)
    with written_back(params, momenta) as (thetas, bufs):
        for i, theta in enumerate(thetas):
            n, bits = theta.numel(), frozen[i]
            if n == 0:
                continue
            with launch.on(theta):
                _step[(triton.cdiv(n, BYTES * 8),)](
                    theta,
                    grads[i].contiguous(),
                    bufs[i] if bufs else None,
                    None if bits is None else bits.contiguous(),
                    rate if isinstance(rate, Tensor) else None,
                    0.0 if isinstance(rate, Tensor) else rate,
                    float(momentum),
                    float(weight_decay) if weight_decay != 0 else None,
                    float(1 - dampening),
                    n,
                    NESTEROV=nesterov,
                    MAXIMIZE=maximize,
                    FIRST=first,
                    BLOCK=BYTES,
                    WIDE=launch.wide(n),
                    enable_fp_fusion=True,
                )
