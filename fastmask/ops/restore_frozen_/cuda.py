"""The CUDA engine's restore_frozen_: all tensors in one launch."""

from __future__ import annotations

from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import place
from fastmask.ops._tables import table, written_back


def restore_frozen_(params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None]) -> None:
    """theta = saved where frozen."""
    held = [i for i, bits in enumerate(frozen) if bits is not None]
    with written_back([params[i] for i in held]) as (some,):
        rows, _alive = table(some, [saved[i] for i in held], [frozen[i] for i in held])
        size = params[0].element_size()
        _cuda.restore_frozen_(rows.buffer_info()[0], len(held), size, *place(params[0]))
