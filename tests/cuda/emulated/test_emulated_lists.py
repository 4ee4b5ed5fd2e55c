"""restore_frozen_, masked_sgd_, masked_adamw_: frozen bits as integers, free entries within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask.ops.masked_adamw_ import cuda as adamw
from fastmask.ops.masked_sgd_ import cuda as sgd
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

Put = Callable[[Tensor], Tensor]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Pieces of a block end within and behind the last ones.
SHAPES = [*ADVERSARIAL_SHAPES, (0, 3), (1, 8192), (3, 5003)]
SGD: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "first": True},
]
DENSITIES = (0.5, 0.0, 1.0, 0.02, 0.98)


def masks() -> list[Tensor]:
    return [
        mask(*shape, seed=i, density=DENSITIES[i % len(DENSITIES)])
        for i, shape in enumerate(SHAPES)
    ]


def spoiled(tensor: Tensor, m: Tensor) -> Tensor:
    """The tensor with NaN, infinity and -0.0 where m, as nothing of it may be touched there."""
    strange = torch.tensor([float("nan"), float("inf"), -0.0], dtype=tensor.dtype)
    at = torch.arange(tensor.numel()).view(tensor.shape) % 3
    return torch.where(m, strange[at], tensor)


Step = Callable[[list[list[Tensor]], list[Tensor | None], str], None]


def check(
    start: list[list[Tensor]], step: Step, written: int, put: Put, first: bool = False
) -> None:
    """Step by both back ends over lists of tensors of all shapes; the first `written` lists change."""
    frozen = masks()
    bits: list[Tensor | None] = [put(ops.pack(m)) for m in frozen]
    bits[2], frozen[2] = None, torch.zeros_like(frozen[2])
    ours = [[put(spoiled(t, m)) for t, m in zip(each, frozen, strict=True)] for each in start]
    ours[0][5] = non_contiguous(ours[0][5])
    plain = [[t.clone() for t in each] for each in start]
    exact = [[t.double() for t in each] for each in start]
    versions = [[t._version for t in each] for each in ours[:written]]
    with poisoned_memory():
        step(ours, bits, "cuda")
    step(plain, bits, "reference")
    step(exact, bits, "reference")
    for which in range(written):
        for i, m in enumerate(frozen):
            got = ours[which][i]
            kept = spoiled(start[which][i], m)
            if first and which == 1:
                kept = torch.zeros_like(kept)
            assert_same_bits(got, kept, where=m)
            assert_within_budget(got[~m], plain[which][i][~m], exact[which][i][~m])
            assert got._version > versions[which][i]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_restore(dtype: torch.dtype, put: Put) -> None:
    frozen = masks()
    params = [values(*shape, dtype=dtype) for shape in SHAPES]
    saved = [put(spoiled(p + 1, torch.ones_like(m))) for p, m in zip(params, frozen, strict=True)]
    ours = [put(p.clone()) for p in params]
    ours[7] = non_contiguous(ours[7])
    bits: list[Tensor | None] = [put(ops.pack(m)) for m in frozen]
    bits[1] = None
    ops.restore_frozen_(ours, saved, bits, backend="cuda")
    for i, (got, p, old, m) in enumerate(zip(ours, params, saved, frozen, strict=True)):
        assert_same_bits(got, torch.where(m, old, p) if i != 1 else p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", SGD, ids=lambda o: "-".join(o) or "plain")
def test_sgd(options: dict[str, Any], dtype: torch.dtype, put: Put) -> None:
    start = [
        [values(*shape, seed=seed, dtype=dtype) for shape in SHAPES] for seed in range(3)
    ]  # params, momenta, gradients

    def step(t: list[list[Tensor]], bits: list[Tensor | None], backend: str) -> None:
        momenta = t[1] if "momentum" in options else None
        ops.masked_sgd_(t[0], t[2], momenta, bits, lr=0.1, backend=backend, **options)

    check(start, step, 2 if "momentum" in options else 1, put, "first" in options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.0}, {"weight_decay": 0.1, "maximize": True}]
)
def test_adamw(options: dict[str, Any], amsgrad: bool, dtype: torch.dtype, put: Put) -> None:
    start = [[values(*shape, seed=seed, dtype=dtype) for shape in SHAPES] for seed in range(5)]
    start[2:4] = [[t.square() for t in each] for each in start[2:4]]

    def step(t: list[list[Tensor]], bits: list[Tensor | None], backend: str) -> None:
        steps = [torch.tensor(float(i)) for i in range(len(SHAPES))]
        largest = t[3] if amsgrad else None
        ops.masked_adamw_(
            t[0], t[4], t[1], t[2], largest, steps, bits, lr=0.01, backend=backend, **options
        )
        assert [s.item() for s in steps] == list(range(1, len(SHAPES) + 1))

    check(start, step, 4 if amsgrad else 3, put)


def test_rates_and_counts_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the kernels read them; here they are kept as tensors on the CPU."""
    for module in (sgd, adamw):
        monkeypatch.setattr(module, "rate", lambda lr: (0.0, lr.float()))
    monkeypatch.setattr(adamw, "_time", lambda step, _beta1, _beta2: (step.float(), 0))
    start = [[values(*shape, seed=seed).abs() for shape in SHAPES] for seed in range(4)]

    def by_sgd(t: list[list[Tensor]], bits: list[Tensor | None], backend: str) -> None:
        ops.masked_sgd_(t[0], t[1], None, bits, lr=torch.tensor(0.01), backend=backend)

    def by_adamw(t: list[list[Tensor]], bits: list[Tensor | None], backend: str) -> None:
        steps = [torch.tensor(float(7**i % 10007)) for i in range(len(SHAPES))]
        ops.masked_adamw_(
            t[0], t[3], t[1], t[2], None, steps, bits, lr=torch.tensor(0.01), backend=backend
        )

    check(start, by_sgd, 1, lambda t: t)
    check(start, by_adamw, 3, lambda t: t)


def test_more_tensors_than_a_launch_takes() -> None:
    """1,000 tensors in four launches; powers of two, so that nothing but theta - g / 2 is rounded."""
    params = [values(1 + i % 13, seed=i) for i in range(1000)]
    grads = [values(*p.shape, seed=i + 1) for i, p in enumerate(params)]
    bits = [None if i % 3 else ops.pack(mask(*p.shape, seed=i)) for i, p in enumerate(params)]
    want = [p.clone() for p in params]
    ops.masked_sgd_(want, grads, None, bits, lr=0.5, backend="reference")
    ops.masked_sgd_(params, grads, None, bits, lr=0.5, backend="cuda")
    for got, expected in zip(params, want, strict=True):
        assert_same_bits(got, expected)
