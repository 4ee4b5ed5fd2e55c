"""The CUDA engine's masked_linear: W is read once for up to eight rows, each through its own mask.

For few rows a mask; more are right and read W again for every eight (one mask: four). It has no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import KINDS, address, place

DTYPES = tuple(KINDS)
# Rows a mask up to which `auto` takes it: beyond, tensor cores are faster by the count of their products.
MOST_ROWS = 4


def masked_linear(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias."""
    x, weight, active = x.contiguous(), weight.contiguous(), active.contiguous()
    bias = None if bias is None else bias.contiguous()
    groups = None if groups is None else groups.contiguous()
    y = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _cuda.masked_linear(
        x.data_ptr(),
        weight.data_ptr(),
        KINDS[x.dtype],
        active.data_ptr(),
        address(groups),
        len(active),
        len(x),
        weight.shape[0],
        weight.shape[1],
        address(bias),
        y.data_ptr(),
        *place(x),
    )
    return y
