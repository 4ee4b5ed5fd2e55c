"""The CUDA engine's masked_adamw_: all tensors in one launch, steps in float32, rounded when stored.

Counts of steps on the device are read by the kernel, those on the CPU here.
"""

from __future__ import annotations

import functools
import struct
from array import array

import torch
from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import KINDS, address, place, rate
from fastmask.ops._tables import written_back

DTYPES = tuple(KINDS)


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
    torch._foreach_add_(steps, 1)
    number, on_device = rate(lr)
    lists = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rows, alive = array("q"), []
    with written_back(*lists) as (thetas, ms, vs, largest):
        for i, theta in enumerate(thetas):
            count, numbers = _time(steps[i], beta1, beta2)
            bits, grad = frozen[i], grads[i].contiguous()
            bits = None if bits is None else bits.contiguous()
            rows.append(theta.data_ptr())
            rows.append(grad.data_ptr())
            rows.append(ms[i].data_ptr())
            rows.append(vs[i].data_ptr())
            rows.append(largest[i].data_ptr() if largest else 0)
            rows.append(address(bits))
            rows.append(address(count))
            rows.append(numbers)
            rows.append(theta.numel())
            alive.append((grad, bits, count))
        _cuda.masked_adamw_(
            rows.buffer_info()[0],
            len(thetas),
            KINDS[thetas[0].dtype],
            number,
            address(on_device),
            beta1,
            beta2,
            eps,
            weight_decay,
            int(maximize),
            *place(thetas[0]),
        )


def _time(step: Tensor, beta1: float, beta2: float) -> tuple[Tensor | None, int]:
    """A count on the device as float32, or 1 - beta1^t and sqrt(1 - beta2^t) as the halves of an integer."""
    if not step.is_cpu:
        return step.to(torch.float32), 0
    return None, _numbers(step.item(), beta1, beta2)


@functools.lru_cache(maxsize=8)
def _numbers(t: float, beta1: float, beta2: float) -> int:
    """Most tensors have the same count."""
    return struct.unpack("<q", struct.pack("<ff", 1 - beta1**t, (1 - beta2**t) ** 0.5))[0]
