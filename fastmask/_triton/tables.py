"""Many tensors in one launch: a table of addresses on the device, in which each program finds its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row(table_ptr, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's row of the table and its number; the last column is the first program of each."""
    program = tl.program_id(0)
    each = tl.arange(0, ROWS)
    begins = tl.load(table_ptr + each * COLUMNS + COLUMNS - 1, mask=each < rows, other=2**62)
    found = tl.sum((begins <= program).to(tl.int32)) - 1
    return table_ptr + found * COLUMNS, found


def on_device(rows: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The rows on the device, copied there once as long as addresses stay the same.

    While a graph is captured nothing can be copied: a table is there from before or there is none. A graph
    keeps its address, so that it is kept from then on.
    """
    key = rows, device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if key in _tables:
            _captured[key] = _tables[key]
        return _captured.get(key)
    found = _tables.pop(key, None)
    if found is None:
        found = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
    if len(_tables) >= 64:
        del _tables[next(iter(_tables))]
    _tables[key] = found
    if found.is_cuda:
        # It may be dropped while a launch on another stream than that it was made on still reads it.
        found.record_stream(torch.cuda.current_stream(device))
    return found


_Key = tuple[tuple[int, ...], torch.device]
_tables: dict[_Key, Tensor] = {}
_captured: dict[_Key, Tensor] = {}
