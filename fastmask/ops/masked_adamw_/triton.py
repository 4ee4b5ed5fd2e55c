"""Triton's masked_adamw_: weight, gradient, both moments and bits in one pass, one launch a tensor.

The step is computed in float32 from values of the tensors' dtype and rounded when it is stored. Frozen
entries are selected from what was read, so that they keep their bits. What depends on t alone is three
numbers a tensor, made where t is: by Python for a count on the CPU, on the device otherwise, unread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch
from fastmask.ops._tables import written_back

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128


@triton.jit
def _step(
    param_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    max_ptr,
    frozen_ptr,
    scalars_ptr,
    shrink,
    rate,
    root,
    taken1,
    beta2,
    taken2,
    eps,
    n,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    in_n = element < n
    theta = tl.load(param_ptr + element, mask=in_n, other=0.0)
    m = tl.load(m_ptr + element, mask=in_n, other=0.0)
    v = tl.load(v_ptr + element, mask=in_n, other=0.0)
    kind = theta.dtype
    g = tl.load(grad_ptr + element, mask=in_n, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if scalars_ptr is not None:
        shrink = tl.load(scalars_ptr)
        rate = tl.load(scalars_ptr + 1)
        root = tl.load(scalars_ptr + 2)
    if frozen_ptr is not None:
        frozen = packed.expand(tl.load(frozen_ptr + at, mask=at * 8 < n, other=0))
    new_m = m.to(tl.float32)
    new_m += taken1 * (g - new_m)
    new_v = beta2 * v.to(tl.float32) + taken2 * g * g
    largest = new_v
    if max_ptr is not None:
        high = tl.load(max_ptr + element, mask=in_n, other=0.0)
        # As torch.maximum: NaN wins.
        largest = tl.maximum(high.to(tl.float32), new_v, propagate_nan=tl.PropagateNan.ALL)
        kept = largest.to(kind)
        if frozen_ptr is not None:
            kept = tl.where(frozen, high, kept)
        tl.store(max_ptr + element, kept, mask=in_n)
    moved = theta.to(tl.float32) * shrink
    moved -= rate * tl.div_rn(new_m, tl.div_rn(tl.sqrt_rn(largest), root) + eps)
    moved, new_m, new_v = moved.to(kind), new_m.to(kind), new_v.to(kind)
    if frozen_ptr is not None:
        moved = tl.where(frozen, theta, moved)
        new_m = tl.where(frozen, m, new_m)
        new_v = tl.where(frozen, v, new_v)
    tl.store(param_ptr + element, moved, mask=in_n)
    tl.store(m_ptr + element, new_m, mask=in_n)
    tl.store(v_ptr + element, new_v, mask=in_n)


def masked_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    frozen: list[Tensor | None],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """theta, m, v unchanged where frozen; elsewhere m, v = averages, theta -= lr (wd theta + m / d)."""
    lists = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    with written_back(*lists) as (thetas, ms, vs, largest):
        for i, theta in enumerate(thetas):
            steps[i].add_(1)
            n, bits = theta.numel(), frozen[i]
            if n == 0:
                continue
            numbers, scalars = _of_time(steps[i], lr, beta1, beta2, weight_decay)
            with launch.on(theta):
                _step[(triton.cdiv(n, BYTES * 8),)](
                    theta,
                    grads[i].contiguous(),
                    ms[i],
                    vs[i],
                    largest[i] if largest else None,
                    None if bits is None else bits.contiguous(),
                    scalars,
                    *numbers,
                    1.0 - beta1,
                    float(beta2),
                    1.0 - beta2,
                    float(eps),
                    n,
                    MAXIMIZE=maximize,
                    BLOCK=BYTES,
                    WIDE=launch.wide(n),
                    enable_fp_fusion=True,
                )


def _of_time(
    step: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float
) -> tuple[tuple[float, float, float], Tensor | None]:
    """1 - lr wd, lr / (1 - beta1^t), sqrt(1 - beta2^t): as numbers, or on the device where t or lr is."""
    t, rate = launch.number(step), launch.number(lr)
    t = t.double() if isinstance(t, Tensor) else t
    rate = rate.double() if isinstance(rate, Tensor) else rate
    decay, corrected = 1 - rate * weight_decay, rate / (1 - beta1**t)
    root = (1 - beta2**t) ** 0.5
    if not isinstance(corrected, Tensor):
        return (float(decay), corrected, float(root)), None
    scalars = torch.empty(3, device=corrected.device)
    # Numbers are filled in, not copied from the host, so that a CUDA graph can hold this.
    for i, value in enumerate((decay, corrected, root)):
        scalars[i].copy_(value) if isinstance(value, Tensor) else scalars[i].fill_(value)
    return (0.0, 0.0, 0.0), scalars
