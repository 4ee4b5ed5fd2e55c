"""The CPU engine's masked_adamw_: all tensors in one pass; what depends on t alone is made here."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import table, written_back

DTYPES = (torch.float32, torch.bfloat16)


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
    rate = lr.item()
    # Counts are few and mostly equal.
    made: dict[float, tuple[float, float, float]] = {}
    scalars = array("d")
    torch._foreach_add_(steps, 1)
    for step in steps:
        t = step.item()
        if t not in made:
            root = (1 - beta2**t) ** 0.5
            made[t] = (1 - rate * weight_decay, 1 / root, -rate / (1 - beta1**t))
        scalars.extend(made[t])
    with written_back(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs) as (p, m, v, largest):
        rows, _alive = table(p, grads, m, v, largest or None, frozen)
        _cpu.masked_adamw_(
            rows.buffer_info()[0],
            scalars.buffer_info()[0],
            len(p),
            int(p[0].dtype == torch.bfloat16),
            beta1,
            beta2,
            eps,
            int(maximize),
            torch.get_num_threads(),
        )
