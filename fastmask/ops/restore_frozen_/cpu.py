"""The CPU engine's restore_frozen_: frozen elements alone are read and written."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import tabled


def restore_frozen_(
    params: list[Tensor],
    saved: list[Tensor],
    frozen: list[Tensor | None],
    rows: array[int] | None = None,
) -> None:
    """theta = saved where frozen."""
    with tabled(params, saved, (), frozen, rows) as address:
        size, threads = params[0].element_size(), torch.get_num_threads()
        _cpu.restore_frozen_(address, len(params), size, threads)
