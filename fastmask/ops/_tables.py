"""Tensors as the CPU engine's ops over many of them take them: a table of addresses, contiguous memory."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops._eager import unwatched


def engine(op: str, backend: str, param: Tensor) -> ModuleType | None:
    """The CPU engine's module of an op, where it is what computes such tensors and nothing watches."""
    if not unwatched() or _backend.missing("cpu") is not None:
        return None
    module = _backend.resolve(op, backend, param.device, param.dtype)
    return module if module.__name__.endswith(".cpu") else None


def plain(
    op: str,
    backend: str,
    params: Any,
    columns: tuple[Sequence[Tensor] | None, ...],
    frozen: Sequence[Tensor | None] | None,
) -> tuple[ModuleType, array[int]] | None:
    """The CPU engine's module and its table of tensors that need neither check nor copy; None for others.

    One pass in C++ over all of them: 40 us for the 161 tensors of ResNet-50, their gradients, momenta and
    masks, where checks, table and torch's dispatcher in Python take 600 (AMD EPYC).
    """
    if not unwatched() or _backend.missing("cpu") is not None:
        return None
    from fastmask import _cpu

    packed = _cpu.rows(params, columns, frozen)
    if not packed or (module := engine(op, backend, params[0])) is None:
        return None
    return module, array("q", packed)


@contextlib.contextmanager
def tabled(
    params: list[Tensor],
    read: list[Tensor],
    state: tuple[list[Tensor], ...],
    frozen: list[Tensor | None] | None,
    made: array[int] | None,
) -> Iterator[int]:
    """Address of the CPU engine's table: of one made by `plain`, or of memory that is written back after."""
    if made is not None:
        yield made.buffer_info()[0]
        for tensors in (params, *state):
            torch.autograd.graph.increment_version(tensors)
        return
    with written_back(params, *state) as (dense, *kept):
        columns = (read, *(one or None for one in kept), frozen)
        rows, _alive = table(dense, *columns, held=kept[0] if kept and kept[0] else dense)
        yield rows.buffer_info()[0]


def table(
    params: Sequence[Tensor],
    *columns: Sequence[Tensor | None] | None,
    held: Sequence[Tensor] | None = None,
) -> tuple[array[int], list[Sequence[Tensor | None]]]:
    """One row a tensor: its address, that of its companion in each column or 0, its number of elements.

    Before that, where it is asked for, the number of elements of what it holds. The second value is what
    the addresses point into: keep it as long as they are used.
    """
    # A column at once: for the 62 tensors of ResNet-18 a loop over rows takes twice as long.
    alive = [None if column is None else _contiguous(column) for column in columns]
    absent = [0] * len(params)
    sizes = [[one.numel() for one in tensors] for tensors in (held, params) if tensors is not None]
    rows = zip(
        [param.data_ptr() for param in params],
        *(
            absent if column is None else [0 if t is None else t.data_ptr() for t in column]
            for column in alive
        ),
        *sizes,
        strict=True,
    )
    kept = [column for column in alive if column is not None]
    return array("q", itertools.chain.from_iterable(rows)), kept


@contextlib.contextmanager
def written_back(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The same lists, contiguous; copies are written back at the end, and autograd learns of the write."""
    dense = [_contiguous(tensors) for tensors in lists]
    yield dense
    for tensors, copies in zip(lists, dense, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True) if copies is not tensors else ():
            if copy is not tensor:
                tensor.copy_(copy)
        torch.autograd.graph.increment_version(tensors)


def _contiguous(tensors: Any) -> Any:
    """The same list of tensors or None, with copies of those that are not contiguous."""
    if False not in [t is None or t.is_contiguous() for t in tensors]:
        return tensors
    return [None if t is None else t.contiguous() for t in tensors]
