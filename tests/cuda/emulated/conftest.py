"""Collected only where FASTMASK_CUDA_EMULATED names the module that test_emulated.py builds."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from torch import Tensor

from fastmask import _backend

collect_ignore_glob = [] if os.environ.get("FASTMASK_CUDA_EMULATED") else ["test_*.py"]


@pytest.fixture
def auto_takes_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "preference", lambda _device: ("cuda", "reference"))
    _backend._resolve.cache_clear()


_libc = ctypes.CDLL(None, use_errno=True)
_memory = []


def at_the_edge(tensor: Tensor) -> Tensor:
    """The same contiguous values, behind whose last byte lies memory that cannot be read."""
    tensor = tensor.contiguous()
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    _memory.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(page), 0) == 0
    if size == 0:
        return tensor.clone()
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return flat.view(tensor.shape).copy_(tensor)


def off_by_one(tensor: Tensor) -> Tensor:
    """The same contiguous values, one element behind a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + 17)
    first = (-(buffer.data_ptr() // tensor.element_size())) % (16 // tensor.element_size()) + 1
    view = buffer[first : first + tensor.numel()].view(tensor.shape)
    assert view.numel() == 0 or view.data_ptr() % 16 == tensor.element_size() % 16
    return view.copy_(tensor)


PLACES = {"as-it-lies": lambda tensor: tensor, "at-the-edge": at_the_edge, "off-by-one": off_by_one}


@pytest.fixture(params=PLACES)
def put(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Where tensors lie: as torch allocates them, before forbidden memory, off alignment."""
    return PLACES[request.param]
