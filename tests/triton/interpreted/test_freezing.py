"""restore_frozen_, masked_sgd_ and masked_adamw_ in the interpreter: frozen bits, errors of free entries."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SGD: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "first": True},
]
ADAM: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"weight_decay": 0.1, "maximize": True}]


def spoiled(tensor: Tensor, m: Tensor) -> Tensor:
    """The tensor with NaN, infinity and -0.0 where m, as nothing of it may be touched there."""
    strange = torch.tensor([float("nan"), float("inf"), -0.0], dtype=tensor.dtype)
    at = torch.arange(tensor.numel()).view(tensor.shape) % 3
    return torch.where(m, strange[at], tensor)


def check(
    start: list[Tensor], m: Tensor, step: Any, written: int, held: list[Tensor | None] | None = None
) -> None:
    """Step by both back ends from one start; `step(tensors, bits, backend)` writes the first `written`.

    Free entries keep the budget against the same step in float64; frozen ones have their start's bits.
    """
    bits = ops.pack(m)
    ours = [spoiled(t, m) for t in start]
    plain, exact = [t.clone() for t in start], [t.double() for t in start]
    with poisoned_memory():
        step(ours, bits, "triton")
    step(plain, bits, "reference")
    step(exact, bits, "reference")
    for i in range(written):
        kept = spoiled(start[i], m) if held is None or held[i] is None else held[i]
        assert_same_bits(ours[i], kept, where=m)
        assert_within_budget(ours[i][~m], plain[i][~m], exact[i][~m])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_restore(dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: wide)
    params = [values(*shape, dtype=dtype) for shape in ADVERSARIAL_SHAPES]
    masks = [mask(*shape, seed=i) for i, shape in enumerate(ADVERSARIAL_SHAPES)]
    saved = [spoiled(p + 1, torch.ones_like(m)) for p, m in zip(params, masks, strict=True)]
    ours = [p.clone() for p in params]
    ours[7] = non_contiguous(ours[7])
    with poisoned_memory():
        frozen = [ops.pack(m) for m in masks]
        frozen[1] = None
        ops.restore_frozen_(ours, saved, frozen, backend="triton")
    for i, (got, p, old, m) in enumerate(zip(ours, params, saved, masks, strict=True)):
        assert_same_bits(got, torch.where(m, old, p) if i != 1 else p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", SGD, ids=lambda o: "-".join(o) or "plain")
def test_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    rates = itertools.cycle((0.1, torch.tensor(0.1)))
    for number, shape in enumerate(ADVERSARIAL_SHAPES):
        m, rate = mask(*shape, seed=number), next(rates)
        start = [values(*shape, seed=seed, dtype=dtype) for seed in range(3)]

        def step(t: list[Tensor], bits: Tensor, backend: str, rate: Any = rate) -> None:
            momenta = [t[1]] if "momentum" in options else None
            ops.masked_sgd_([t[0]], [t[2]], momenta, [bits], lr=rate, backend=backend, **options)

        held = [None, torch.zeros_like(start[1])] if "first" in options else None
        check(start, m, step, 2 if "momentum" in options else 1, held)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", ADAM, ids="-".join)
def test_adamw(options: dict[str, Any], amsgrad: bool, dtype: torch.dtype) -> None:
    for number, shape in enumerate(ADVERSARIAL_SHAPES):
        m = mask(*shape, seed=number)
        start = [values(*shape, seed=seed, dtype=dtype) for seed in range(5)]
        start[2:4] = [t.square() for t in start[2:4]]

        def step(t: list[Tensor], bits: Tensor, backend: str) -> None:
            largest = [t[3]] if amsgrad else None
            steps = [torch.tensor(6.0)]
            ops.masked_adamw_([t[0]], [t[4]], [t[1]], [t[2]], largest, steps, [bits], lr=0.01,
                              backend=backend, **options)  # fmt: skip
            assert steps[0] == 7

        check(start, m, step, 4 if amsgrad else 3)


def test_several_tensors_strides_and_no_mask() -> None:
    start = [values(37, 45), values(5), values(0, 3)]
    ours, want = (
        [non_contiguous(start[0]), *(t.clone() for t in start[1:])],
        [t.clone() for t in start],
    )
    grads = [values(*t.shape, seed=3) for t in start]
    for tensors, backend in ((ours, "triton"), (want, "reference")):
        versions = [t._version for t in tensors]
        ops.masked_sgd_(tensors, grads, None, None, lr=0.5, backend=backend)
        assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
    # Powers of two: nothing but theta - g / 2 is rounded, on both back ends once.
    for mine, theirs in zip(ours, want, strict=True):
        assert_same_bits(mine.contiguous(), theirs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rates_and_counts_on_the_device(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the kernels read them; here they are kept as tensors on the CPU."""
    monkeypatch.setattr(launch, "number", lambda scalar: scalar.reshape(()))
    m = mask(37, 45)
    start = [values(37, 45, seed=seed, dtype=dtype).abs() for seed in range(4)]
    for rate in (0.01, torch.tensor(0.01)):

        def sgd(t: list[Tensor], bits: Tensor, backend: str, rate: Any = rate) -> None:
            ops.masked_sgd_([t[0]], [t[1]], None, [bits], lr=rate, backend=backend)

        def adamw(t: list[Tensor], bits: Tensor, backend: str, rate: Any = rate) -> None:
            steps = [torch.tensor(6.0)]
            ops.masked_adamw_([t[0]], [t[3]], [t[1]], [t[2]], None, steps, [bits], lr=rate,
                              backend=backend)  # fmt: skip

        check(start, m, sgd, 1)
        check(start, m, adamw, 3)
