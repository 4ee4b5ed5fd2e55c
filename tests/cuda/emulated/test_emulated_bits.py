"""pack and popcount: bits equal to the reference's, wherever tensors lie."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmask import _backend, ops
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    generator,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

Put = Callable[[Tensor], Tensor]
SHAPES = [*ADVERSARIAL_SHAPES, (0, 3), (3, 2731)]


def test_the_engine_is_asked() -> None:
    cpu = torch.device("cpu")
    assert _backend.resolve("pack", "cuda", cpu).__name__ == "fastmask.ops.pack.cuda"
    assert _backend.resolve("pack", "auto", cpu).__name__ == "fastmask.ops.pack.reference"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [(80, True), (86, True), (75, False), (90, True), (120, True), (53, False)],
)
def test_a_device_it_was_not_compiled_for_is_named(
    capability: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated module says that it was compiled for 8.0, and for 9.0 with PTX for what comes later."""
    monkeypatch.setenv("EMULATED_CAPABILITY", str(capability))
    said = f"device 0 has compute capability {capability // 10}.{capability % 10} and it was compiled for "
    assert sys.modules["fastmask._cuda"].missing() == (None if runs else said + "80 90+")


def test_bools_are_packed(put: Put) -> None:
    for i, shape in enumerate(SHAPES):
        m = put(mask(*shape, seed=i))
        with poisoned_memory():
            got = ops.pack(m, backend="cuda")
        assert_same_bits(got, ops.pack(m, backend="reference"))
        strided = non_contiguous(m)
        assert_same_bits(ops.pack(strided, backend="cuda"), got)


def test_any_byte_but_0_is_true() -> None:
    m = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    assert int(ops.popcount(ops.pack(m, backend="cuda"))) == 255


@pytest.mark.parametrize("mu", [0.0, -0.5, 0.1, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_packed(dtype: torch.dtype, mu: float, put: Put) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, mu], dtype=dtype)
    for i, shape in enumerate(SHAPES):
        scores = values(*shape, seed=i, dtype=dtype)
        scores.view(-1)[:6] = special[: scores.numel()]
        scores = put(scores)
        with poisoned_memory():
            got = ops.pack(scores, mu, backend="cuda")
        assert_same_bits(got, ops.pack(scores, mu, backend="reference"))


@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("size", [0, 1, 8, 15, 16, 17, 33, 32768, 70001])
def test_ones_are_counted(size: int, samples: int | None, put: Put) -> None:
    shape = (size,) if samples is None else (samples, size)
    bits = put(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(size)))
    with poisoned_memory():
        got = ops.popcount(bits, backend="cuda")
    assert torch.equal(got, ops.popcount(bits, backend="reference"))
    full = torch.full_like(bits, 255)
    assert torch.equal(ops.popcount(full, backend="cuda"), got.new_full(got.shape, 8 * size))


def test_popcount_of_no_mask() -> None:
    assert ops.popcount(torch.empty(0, 8, dtype=torch.uint8), backend="cuda").shape == (0,)
