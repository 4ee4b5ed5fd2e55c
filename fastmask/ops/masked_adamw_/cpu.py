"""The CPU engine's masked_adamw_: all tensors in one pass; what depends on t alone is made here."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import tabled

DTYPES = (torch.float32, torch.bfloat16)
compact_state = True


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
    rows: array[int] | None = None,
) -> None:
    """theta, m, v unchanged where frozen; elsewhere m, v = averages, theta -= lr (wd theta + m / d)."""
    rate = lr.item()
    counts = _advanced(steps)
    # Counts are few and mostly equal.
    of_time = {
        t: (1 - rate * weight_decay, 1 / (1 - beta2**t) ** 0.5, -rate / (1 - beta1**t))
        for t in set(counts)
    }
    scalars = array("d", itertools.chain.from_iterable(map(of_time.__getitem__, counts)))
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    with tabled(params, grads, state, frozen, rows) as address:
        _cpu.masked_adamw_(
            address,
            scalars.buffer_info()[0],
            len(params),
            int(params[0].dtype == torch.bfloat16),
            beta1,
            beta2,
            eps,
            int(maximize),
            torch.get_num_threads(),
        )


def _advanced(steps: list[Tensor]) -> Sequence[float]:
    """Count a step more, and return the counts."""
    advanced = _cpu.advance(steps)
    if advanced is None:
        torch._foreach_add_(steps, 1)
        return [step.item() for step in steps]
    torch.autograd.graph.increment_version(steps)
    return array("d", advanced)
