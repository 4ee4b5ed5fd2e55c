"""The CPU engine's masked_sgd_: all tensors in one pass; in float32 with the bits of torch's for-loop."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import table, written_back

DTYPES = (torch.float32, torch.bfloat16)


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
    with written_back(params, momenta) as (params, momenta):
        rows, _alive = table(params, grads, momenta or None, frozen)
        _cpu.masked_sgd_(
            rows.buffer_info()[0],
            len(params),
            int(params[0].dtype == torch.bfloat16),
            -lr.item(),
            momentum,
            weight_decay,
            dampening,
            int(nesterov),
            int(maximize),
            int(first),
            torch.get_num_threads(),
        )
