"""masked_weights in the interpreter: the reference's bits for many weights in one launch."""

from __future__ import annotations

import pytest
import torch

from fastmask import ops
from fastmask._triton import launch, tables
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

LAST = torch.channels_last
SHAPES = [
    *ADVERSARIAL_SHAPES,
    (5, 3, 3, 2),
    (0, 3),
    (2, 8, 3, 3),
    (3, 1, 5, 5),
    (9, 5, 1, 1),
    (17, 16, 3, 3),
    (),
]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_weights_of_all_layouts(
    dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: wide)
    masks = [mask(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    bits = [ops.pack(m) for m in masks]
    weights = [
        torch.where(m, values(*m.shape, seed=i, dtype=dtype), float("nan"))
        for i, m in enumerate(masks)
    ]
    last = [w.to(memory_format=LAST) if w.dim() == 4 else w for w in weights]
    mixed = [non_contiguous(w) if i % 3 == 0 else w for i, w in enumerate(last)]
    for given in (weights, last, mixed):
        with poisoned_memory():
            got = ops.masked_weights(given, bits, backend="triton")
        want = ops.masked_weights(given, bits, backend="reference")
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)
            assert one.stride() == other.stride()


def test_gradients_and_addresses_that_stay() -> None:
    m = [mask(37, 45), mask(4, 3, 3, 3)]
    bits = [ops.pack(one) for one in m]
    leaves = [values(*one.shape).requires_grad_() for one in m]
    for factor in (1.0, 3.0):
        chosen = ops.masked_weights(leaves, bits, backend="triton")
        grads = torch.autograd.grad(sum((factor * one).sum() for one in chosen), leaves)
        assert all(torch.equal(g, factor * one) for g, one in zip(grads, m, strict=True))
        with torch.no_grad():
            leaves[0].mul_(2)


def test_addresses_are_copied_once_and_kept_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is played by the CPU, and capturing by a switch."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _device: self)
    monkeypatch.setattr(tables, "_tables", {})
    monkeypatch.setattr(tables, "_captured", {})
    keys = [((i, 0, 0, 0, 1, 1, 0), torch.device("cuda")) for i in range(66)]
    first = tables.on_device(*keys[0])
    assert tables.on_device(*keys[0]) is first
    capturing[0] = True
    assert tables.on_device(*keys[0]) is first
    assert tables.on_device(*keys[1]) is None, "nothing can be copied now"
    capturing[0] = False
    for key in keys[1:]:
        tables.on_device(*key)
    assert len(tables._tables) == 64 and keys[0] not in tables._tables
    capturing[0] = True
    assert tables.on_device(*keys[0]) is first, "a graph has its address"


def test_autocast() -> None:
    w, m = values(37, 45).requires_grad_(), mask(37, 45)
    with torch.autocast("cpu", torch.float16):
        (chosen,) = ops.masked_weights([w], [ops.pack(m)], backend="triton")
    assert_same_bits(chosen.detach(), torch.where(m, w.detach().half(), 0.0).half())
    chosen.float().sum().backward()
    assert w.grad is not None and torch.equal(w.grad, m.float())
