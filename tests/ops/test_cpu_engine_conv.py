"""Convolutions of the CPU engine: the selection itself, and the memory that calls share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _backend, ops
from fastmask.testing import assert_same_bits, mask, values

if _backend.missing("cpu") is not None:
    pytest.skip(f"no CPU engine: {_backend.missing('cpu')}", allow_module_level=True)

from fastmask import _cpu
from fastmask.ops import _scratch
from fastmask.ops.masked_conv2d import cpu, op
from fastmask.ops.masked_linear.cpu import _select_into

PADDED = {"padding": 1}


@pytest.fixture(autouse=True)
def nothing_waits() -> None:
    _scratch._waiting.clear()


def layer(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, weight, packed bits, and what torch gives for the selected weight."""
    x, w = (
        values(2, 24, 12, 12, seed=seed, dtype=dtype),
        values(40, 24, 3, 3, seed=seed, dtype=dtype),
    )
    m = mask(*w.shape, seed=seed)
    return x, w, ops.pack(m), F.conv2d(x, torch.where(m, w, 0), **PADDED)


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_where_at_every_size_and_in_place(dtype: torch.dtype, isa: str) -> None:
    before = _cpu.isa()
    try:
        _cpu.use(isa)
        for n in (*range(1, 131), 8191, 8192, 8193, 100_003):
            w, m = values(n, dtype=dtype), mask(n)
            w[~m] = float("nan")
            want, bits, out = torch.where(m, w, 0), ops.pack(m), torch.full_like(w, 7.0)
            _select_into(out, w, bits.data_ptr())
            _select_into(w, w, bits.data_ptr())
            assert torch.equal(out, want), n
            assert torch.equal(w, want), n
    finally:
        _cpu.use(before)


def test_what_a_call_returns_stays_while_others_run() -> None:
    kept = []
    for seed in range(4):
        x, w, bits, want = layer(seed)
        leaves = [x.requires_grad_(), w.requires_grad_()]
        kept.append((leaves, bits, want, ops.masked_conv2d(x, w, bits, **PADDED)))
    assert len(_scratch._waiting) == 1
    for leaves, bits, want, y in kept:
        assert_same_bits(y.detach(), want)
        dy = values(*y.shape)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        copies = [g.clone() for g in first]
        m = ops.unpack(bits, leaves[1].shape)
        chosen = torch.where(m, leaves[1].detach(), 0).requires_grad_()
        other = torch.autograd.grad(F.conv2d(leaves[0], chosen, **PADDED), (leaves[0], chosen), dy)
        for one, copy, plain in zip(
            first, copies, (other[0], torch.where(m, other[1], 0)), strict=True
        ):
            assert_same_bits(one, copy)
            assert_same_bits(one, plain)
    assert len(_scratch._waiting) == 1


def test_calls_within_calls_and_in_threads_have_memory_of_their_own() -> None:
    one, other = _scratch.take(100), _scratch.take(100)
    assert one.data_ptr() != other.data_ptr()
    _scratch.give(one)
    _scratch.give(other)
    wrong: list[int] = []
    layers = [layer(seed, torch.bfloat16 if seed % 2 else torch.float32) for seed in range(6)]

    def work(seed: int) -> None:
        x, w, bits, want = layers[seed]
        for _ in range(30):
            if not torch.equal(ops.masked_conv2d(x, w, bits, **PADDED), want):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(_scratch._waiting) <= _scratch.BLOCKS
    assert len({block.data_ptr() for block in _scratch._waiting}) == len(_scratch._waiting)


def test_memory_is_bounded_and_grows_with_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (100, 5000, 70):
        block = _scratch.take(size)
        assert block.nbytes >= size
        _scratch.give(block)
    assert [block.nbytes for block in _scratch._waiting] == [5056]
    blocks = [_scratch.take(64) for _ in range(2 * _scratch.BLOCKS)]
    for block in blocks:
        _scratch.give(block)
    assert len(_scratch._waiting) == _scratch.BLOCKS
    monkeypatch.setattr(_scratch, "KEPT", 1000)
    _scratch._waiting.clear()
    x, w, bits, want = layer(0)
    assert_same_bits(ops.masked_conv2d(x, w, bits, **PADDED), want)
    assert not _scratch._waiting


def test_a_call_that_fails_gives_its_memory_back() -> None:
    x, w, bits, _ = layer(0)
    with pytest.raises(RuntimeError):
        cpu.masked_conv2d(x[:, :5], w, bits.unsqueeze(0), None, [1, 1], [1, 1], [1, 1], 1)
    assert len(_scratch._waiting) == 1


def test_what_fails_past_the_dispatcher_is_not_computed_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, bits, _ = layer(0)

    def fails(*_: Any) -> Tensor:
        monkeypatch.undo()
        raise RuntimeError("as it happens")

    monkeypatch.setattr(cpu, "masked_conv2d", fails)
    with pytest.raises(RuntimeError, match="as it happens"):
        ops.masked_conv2d(x, w, bits, **PADDED)


def test_memory_made_in_inference_mode_serves_training() -> None:
    x, w, bits, want = layer(0)
    with torch.inference_mode():
        assert_same_bits(ops.masked_conv2d(x, w, bits, **PADDED), want)
    w.requires_grad_()
    last = w.detach().to(memory_format=torch.channels_last).requires_grad_()
    for weight in (w, last):
        ops.masked_conv2d(x.requires_grad_(), weight, bits, **PADDED).sum().backward()
    assert_same_bits(w.grad, last.grad.contiguous())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_writes_into_a_copy() -> None:
    program = """
import os, torch
from fastmask import ops
from fastmask.ops import _scratch
torch.set_num_threads(1)
x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
masks = [ops.pack(torch.rand(w.shape) < p) for p in (0.3, 0.7)]
want = [ops.masked_conv2d(x, w, bits).numpy().tobytes() for bits in masks]
(block,) = _scratch._waiting
before = block.numpy().tobytes()
child = os.fork()
if child == 0:
    got = [ops.masked_conv2d(x, w, bits).numpy().tobytes() for bits in masks[::-1]]
    os._exit(0 if got == want[::-1] else 1)
assert os.waitpid(child, 0)[1] == 0
assert block.numpy().tobytes() == before
assert [ops.masked_conv2d(x, w, bits).numpy().tobytes() for bits in masks] == want
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_calls_that_nothing_watches_are_those_that_something_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, bits, _ = layer(1, dtype)
    b = values(40, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    options: dict[str, Any] = {"stride": (2, 1), "padding": (0, 2), "dilation": 2}

    def results() -> list[Tensor]:
        y = ops.masked_conv2d(x, w, bits, b, **options)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with torch.profiler.profile() as watched:
        seen = results()
    names = {event.key for event in watched.key_averages()}
    assert "fastmask::masked_conv2d" in names
    monkeypatch.setattr(op._MaskedConv2d, "apply", None)
    for one, other in zip(results(), seen, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_convolutions_have_the_gradients_of_two_calls_in_one(
    dtype: torch.dtype, last: bool
) -> None:
    x, w, _, _ = layer(2, dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    scores = values(*w.shape, seed=5)
    leaves = [x.requires_grad_(), scores.requires_grad_()]
    y = ops.learned_conv2d(x, w, scores, seed=7, **PADDED)
    dy = values(*y.shape, dtype=dtype)
    both = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for i, got in enumerate(both):
        one = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        alone = ops.learned_conv2d(one[0], w, one[1], seed=7, **PADDED)
        assert_same_bits(torch.autograd.grad(alone, one[i], dy)[0], got)
    with torch.profiler.profile():
        watched = ops.learned_conv2d(x, w, scores, seed=7, **PADDED)
        others = torch.autograd.grad(watched, leaves, dy)
    assert_same_bits(watched.detach(), y.detach())
    for got, other in zip(both, others, strict=True):
        assert_same_bits(got, other)
