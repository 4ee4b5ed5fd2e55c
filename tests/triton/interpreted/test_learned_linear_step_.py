"""learned_linear_step_ in the interpreter: the reference's step within the error budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch
from fastmask.testing import (
    assert_within_budget,
    non_contiguous,
    poisoned_memory,
    values,
)

FLOATS = [torch.float32, torch.float16]
GUMBEL: dict[str, Any] = {"method": "gumbel", "seed": 2**64 - 3, "tau": 0.5}
RULES: dict[str, dict[str, Any]] = {
    "gumbel": GUMBEL,
    "gumbel flip": {**GUMBEL, "off": "flip", "tau": 1.0},
    "gumbel scale": {**GUMBEL, "scale": "rsqrt_density"},
    "threshold": {"method": "threshold"},
    "topk flip": {"method": "topk", "off": "flip"},
    "threshold scale": {"method": "threshold", "scale": "rsqrt_density"},
}
NUMBERS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "first": True},
]


def run(
    tensors: list[Tensor], active: Tensor, backend: str, lr: Any = 0.1, **options: Any
) -> list[Tensor]:
    """Scores and momentum after a step of copies of them."""
    dy, x, w, *stepped = tensors
    theta, held = (t.clone(memory_format=torch.preserve_format) for t in stepped)
    if options.get("first"):
        held.fill_(float("nan"))
    ops.learned_linear_step_(dy, x, w, theta, active, held, lr=lr, backend=backend, **options)
    return [theta, held]


def check(
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    samples: int = 1,
    scores_dtype: torch.dtype = torch.float32,
    lr: Any = 0.1,
    strange: bool = False,
    **options: Any,
) -> None:
    n, k = shape
    sizes = ((rows, n), (rows, k), (n, k))
    # Numbers that float16 holds, so that all dtypes compute the same thing.
    layer = [values(*size, seed=i, dtype=torch.float16).to(dtype) for i, size in enumerate(sizes)]
    state = [values(n, k, seed=seed).to(scores_dtype) for seed in (3, 4)]
    active = torch.stack([ops.pack(values(n, k, seed=5 + s), 0.0) for s in range(samples)])
    tensors = [*layer, *state]
    plain = run(tensors, active, "reference", lr, **options)
    exact = run([t.double() for t in tensors], active, "reference", lr, **options)
    if strange:
        tensors = [non_contiguous(t) for t in tensors]
    with poisoned_memory():
        ours = run(tensors, active, "triton", lr, **options)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine, theirs, true)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_step(rule: str, dtype: torch.dtype) -> None:
    for i, shape in enumerate([(1, 7), (37, 45), (7, 64), (67, 136)]):
        check(shape, (3, 21, 1, 5)[i], dtype, **RULES[rule], **NUMBERS[2 + i % 3])


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_the_numbers_of_a_step(numbers: dict[str, Any]) -> None:
    for rule in ("gumbel", "threshold"):
        check((7, 64), 5, torch.float32, **RULES[rule], **numbers)


@pytest.mark.parametrize("named", [False, True], ids=["samples", "groups"])
def test_samples(named: bool) -> None:
    for shape in ((5, 1), (37, 45), (7, 64)):
        groups = torch.randint(0, 3, (21,), generator=torch.Generator()) if named else None
        # With groups, two samples have no rows.
        count = 5 if named else 3
        check(shape, 21, torch.float32, count, groups=groups, momentum=0.9, **GUMBEL)


@pytest.mark.parametrize("scores_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scores_of_other_dtypes(scores_dtype: torch.dtype) -> None:
    check((37, 45), 5, torch.float32, 1, scores_dtype, momentum=0.9, **GUMBEL)


def test_offsets_of_64_bits_and_strange_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: True)
    check((7, 64), 5, torch.float32, strange=True, momentum=0.9, **GUMBEL)


def test_a_rate_that_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "number", lambda lr: lr)
    for numbers in NUMBERS[::2]:
        check((7, 64), 5, torch.float32, lr=torch.tensor(0.1), **GUMBEL, **numbers)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 8)], ids=str)
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    check(shape, 0, torch.float32, momentum=0.9, weight_decay=0.1, **GUMBEL)
