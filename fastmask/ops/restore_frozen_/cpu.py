"""The CPU engine's restore_frozen_: frozen elements alone are read and written."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import table, written_back


def restore_frozen_(params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None]) -> None:
    """theta = saved where frozen."""
    held = [i for i, bits in enumerate(frozen) if bits is not None]
    with written_back([params[i] for i in held]) as (some,):
        rows, _alive = table(some, [saved[i] for i in held], [frozen[i] for i in held])
        if held:
            size, threads = params[0].element_size(), torch.get_num_threads()
            _cpu.restore_frozen_(rows.buffer_info()[0], len(held), size, threads)
