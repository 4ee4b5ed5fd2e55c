"""The CPU engine's masked_sgd_: all tensors in one pass; in float32 with the bits of torch's for-loop."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import tabled

DTYPES = (torch.float32, torch.bfloat16)
compact_state = True


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
    rows: array[int] | None = None,
) -> None:
    """theta, buf unchanged where frozen; elsewhere buf = mu buf + (1 - damp) g, theta -= lr d."""
    with tabled(params, grads, (momenta,), frozen, rows) as address:
        _cpu.masked_sgd_(
            address,
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
