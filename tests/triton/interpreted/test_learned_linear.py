"""learned_linear in the interpreter: the reference's bits, everything else within its error budget.

bfloat16 is left out: the interpreter's product of it is wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch, tiles
from fastmask.ops.learned_linear import triton
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
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
    "threshold": {"method": "threshold", "mu": 0.1},
    "threshold flip": {"method": "threshold", "off": "flip"},
    "threshold scale": {"method": "threshold", "scale": "rsqrt_density"},
    "topk": {"method": "topk", "density": 0.3},
    "topk scale": {"method": "topk", "density": 0.3, "scale": "rsqrt_density"},
}


def run(
    x: Tensor, w: Tensor, scores: Tensor, b: Tensor | None, backend: str, **options: Any
) -> list[Tensor]:
    """Output and gradients of x, w, scores (and b)."""
    leaves = [t.detach().requires_grad_() for t in (x, w, scores, b) if t is not None]
    bias = leaves[3] if b is not None else None
    y = ops.learned_linear(*leaves[:3], bias=bias, backend=backend, **options)
    grad = values(*y.shape, seed=9, dtype=torch.float16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    scores: Tensor | None = None,
    **options: Any,
) -> None:
    # Numbers that float16 holds, so that all dtypes compute the same thing.
    x, w = (values(n, shape[1], seed=n, dtype=torch.float16).to(dtype) for n in (rows, shape[0]))
    b = values(shape[0], seed=5, dtype=torch.float16).to(dtype) if rows % 2 else None
    scores = values(*shape, seed=3) if scores is None else scores
    with poisoned_memory():
        ours = run(x, w, scores, b, "triton", **options)
    plain = run(x, w, scores, b, "reference", **options)
    double = [None if t is None else t.double() for t in (x, w, scores, b)]
    exact = run(*double, "reference", **options)  # type: ignore[arg-type]
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine, theirs, true)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_output_and_gradients(rule: str, dtype: torch.dtype) -> None:
    every = rule == "gumbel" and dtype == torch.float32
    few = [(1, 7), (3, 8), (37, 45), (7, 64)]
    for i, shape in enumerate(ADVERSARIAL_SHAPES if every else few):
        check(shape, (3, 21, 1)[i % 3], dtype, **RULES[rule])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", ["gumbel", "gumbel flip", "gumbel scale"])
@pytest.mark.parametrize("named", [False, True], ids=["samples", "groups"])
def test_samples(rule: str, named: bool, dtype: torch.dtype) -> None:
    for shape in ((5, 1), (37, 45), (7, 64)):
        groups = torch.randint(0, 3, (21,), generator=torch.Generator()) if named else None
        # With groups, two samples have no rows.
        check(shape, 21, dtype, groups=groups, samples=5 if named else 3, **RULES[rule])


@pytest.mark.parametrize("rule", ["gumbel", "threshold flip"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_more_rows_than_a_tile_and_split_sums(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: True)
    check((7, 64), triton.ONE_TILE + 3, dtype, **RULES[rule])
    assert tiles.splits(1, 264 // 32) == 2
    check((10, 264), 7, dtype, **RULES[rule])


@pytest.mark.parametrize("scores_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["gumbel", "threshold", "topk"])
def test_scores_of_other_dtypes(rule: str, scores_dtype: torch.dtype) -> None:
    for shape in ((37, 45), (7, 64)):
        scores = values(*shape, seed=3).to(scores_dtype)
        check(shape, 5, torch.float32, scores, **RULES[rule])


@pytest.mark.parametrize("method", ["gumbel", "threshold"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16], ids=str)
def test_bits_are_the_references(method: str, dtype: torch.dtype) -> None:
    """Drawn within the product as by themselves; with special scores and ties; bfloat16's bits too."""
    special = torch.tensor(
        [0.0, -0.0, 0.1, 1e-45, 88.0, -104.0, float("inf"), -float("inf"), float("nan")]
    )
    for N, K in ((1, 8), (9, 264), (67, 40)):
        scores = values(N, K, seed=4) * 8
        scores.view(-1)[::3][: len(special)] = special[: len(scores.view(-1)[::3])]
        for given in (scores, scores.half(), non_contiguous(scores)):
            seed = torch.tensor(-7) if method == "gumbel" else None
            arguments = (
                values(5, K).to(dtype),
                values(N, K).to(dtype),
                given,
                None,
                None,
                seed,
                method,
            )
            rest = (1, 0.1, None, "zero", False)
            with poisoned_memory():
                _, bits = torch.ops.fastmask.learned_linear(*arguments, *rest, "triton")
            _, expected = torch.ops.fastmask.learned_linear(*arguments, *rest, "reference")
            assert_same_bits(bits, expected)


@pytest.mark.parametrize("rule", ["gumbel", "threshold flip", "threshold scale"])
def test_a_weight_that_is_no_number(rule: str) -> None:
    """It reaches the output only where it is read, and of the scores' gradients its own alone."""
    for shape in ((7, 64), (37, 45)):
        x, w, scores = values(6, shape[1]), values(*shape), values(*shape, seed=3)
        scores[2, 5] = -60.0
        spoiled = w.clone()
        spoiled[2, 5] = float("nan")
        ours = run(x, spoiled, scores, None, "triton", **RULES[rule])
        expected = run(x, spoiled, scores, None, "reference", **RULES[rule])
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
        if "flip" not in rule:
            assert not ours[0].isnan().any() and not ours[1].isnan().any()
            assert ours[3].isnan().nonzero().tolist() == [[2, 5]]


def test_a_mask_of_nothing_recovers() -> None:
    shape = (7, 64)
    scores = torch.full(shape, -1.0)
    check(shape, 5, torch.float32, scores, method="threshold", scale="rsqrt_density")
    check(shape, 5, torch.float32, scores * 100, **RULES["gumbel scale"])


def test_only_what_is_asked_for() -> None:
    x, w, scores = values(5, 64), values(7, 64), values(7, 64, seed=3)
    for rule in (GUMBEL, RULES["threshold scale"]):
        every = run(x, w, scores, None, "triton", **rule)
        for i, leaf in enumerate((x, w, scores)):
            leaves = [t.detach() for t in (x, w, scores)]
            leaves[i] = leaf.detach().requires_grad_()
            y = ops.learned_linear(*leaves, backend="triton", **rule)
            grad = values(*y.shape, seed=9, dtype=torch.float16).to(y.dtype)
            (found,) = torch.autograd.grad(y, leaves[i], grad)
            assert_same_bits(found, every[1 + i])


def test_the_same_inputs_give_the_same_bits() -> None:
    x, w, scores = values(9, 264), values(10, 264), values(10, 264, seed=3)
    first = run(x, w, scores, None, "triton", **GUMBEL)
    again = run(*(non_contiguous(t) for t in (x, w, scores)), None, "triton", **GUMBEL)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 8)], ids=str)
@pytest.mark.parametrize("rule", ["gumbel", "threshold scale", "topk"])
def test_nothing_to_add(shape: tuple[int, int], rule: str) -> None:
    for rows in (0, 5):
        x, w, b = values(rows, shape[1]), values(*shape), values(shape[0])
        with poisoned_memory():
            ours = run(x, w, values(*shape), b, "triton", **RULES[rule])
        expected = run(x, w, values(*shape), b, "reference", **RULES[rule])
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.shape == theirs.shape
            assert (rows > 0 and shape == (3, 8)) or torch.equal(mine, theirs)
