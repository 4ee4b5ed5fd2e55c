"""Tensors as the CPU engine's ops over many of them take them: a table of addresses, contiguous memory."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def table(
    params: Sequence[Tensor], *columns: Sequence[Tensor | None] | None
) -> tuple[array[int], list[Tensor]]:
    """One row a tensor: its address, that of its companion in each column or 0, its number of elements.

    The second value is what the addresses point into: keep it as long as they are used.
    """
    rows, alive = array("q"), []
    for i, param in enumerate(params):
        rows.append(param.data_ptr())
        for column in columns:
            tensor = None if column is None else column[i]
            tensor = None if tensor is None else tensor.contiguous()
            rows.append(0 if tensor is None else tensor.data_ptr())
            if tensor is not None:
                alive.append(tensor)
        rows.append(param.numel())
    return rows, alive


@contextlib.contextmanager
def written_back(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The same lists, contiguous; copies are written back at the end, and autograd learns of the write."""
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in lists]
    yield dense
    for tensors, copies in zip(lists, dense, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy.data_ptr() != tensor.data_ptr():
                tensor.copy_(copy)
            else:
                torch.autograd.graph.increment_version(tensor)
