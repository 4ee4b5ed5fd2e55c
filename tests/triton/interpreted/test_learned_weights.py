"""learned_weights in the interpreter: many weights in one launch, bits and weights of the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch, tables
from fastmask.ops.learned_weights import triton
from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    non_contiguous,
    poisoned_memory,
    values,
)

LAST = torch.channels_last
SHAPES = [(1, 1), (37, 45), (5, 3, 3, 2), (2, 8, 3, 3), (0, 3), (7,), (16, 8, 3, 3), ()]
SEEDS = [2**63 + 5 * i for i in range(len(SHAPES))]
METHODS: dict[str, dict[str, Any]] = {
    "gumbel": {"method": "gumbel", "seeds": SEEDS},
    "gumbel flip": {"method": "gumbel", "seeds": SEEDS, "tau": 0.5, "off": "flip"},
    "threshold": {"method": "threshold", "mu": 0.1},
    "topk flip": {"method": "topk", "density": 0.4, "off": "flip"},
}


def run(weights: list[Tensor], scores: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """Weights and the gradients of weights and scores."""
    leaves = [t.detach().requires_grad_() for t in (*weights, *scores)]
    n = len(weights)
    made = ops.learned_weights(leaves[:n], leaves[n:], backend=backend, **options)
    upstream = [
        values(*w.shape, seed=i, dtype=torch.bfloat16).to(w.dtype) for i, w in enumerate(made)
    ]
    return [*(w.detach() for w in made), *torch.autograd.grad(made, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_many_weights_of_all_layouts(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: dtype == torch.bfloat16)
    options = METHODS[method]
    weights = [values(*s, seed=i, dtype=torch.bfloat16).to(dtype) for i, s in enumerate(SHAPES)]
    scores = [values(*s, seed=50 + i) for i, s in enumerate(SHAPES)]
    last = [t.to(memory_format=LAST) if t.dim() == 4 else t for t in weights]
    own = [t.to(memory_format=LAST) if t.dim() == 4 and i % 2 else t for i, t in enumerate(scores)]
    mixed = [non_contiguous(t) if i % 3 == 0 else t for i, t in enumerate(last)]
    exact = run([w.double() for w in weights], [s.double() for s in scores], "reference", **options)
    plain = run(weights, scores, "reference", **options)
    for given, taught in ((weights, scores), (last, own), (mixed, scores)):
        with poisoned_memory():
            ours = run(given, taught, "triton", **options)
        like = [*given, *given, *taught]
        for i, (mine, theirs, true, t) in enumerate(zip(ours, plain, exact, like, strict=True)):
            assert mine.stride() == torch.empty_like(t).stride()
            if i < 2 * len(SHAPES):
                assert_same_bits(mine, theirs)
            else:
                assert_within_budget(mine, theirs, true)


def test_bits_of_many_seeds_are_those_of_sample_mask() -> None:
    weights = [values(37, 45), values(5, 3, 3, 2).to(memory_format=LAST), values(130)]
    scores = [10 * values(*w.shape, seed=9) for w in weights]
    for first in (-1, 2**62, 1 - 2**63):
        seeds = torch.tensor([first, 5, -first])
        rest = (seeds, "gumbel", 0.0, None, "zero", torch.float32)
        with poisoned_memory():
            _, active = triton.learned_weights(weights, scores, *rest)
        for bits, logits, seed in zip(active, scores, seeds, strict=True):
            want = ops.sample_mask(logits, seed, backend="reference")[0]
            assert torch.equal(bits, want)


def test_weights_and_scores_that_are_no_numbers() -> None:
    weights, scores = [values(37, 45)], [values(37, 45, seed=2)]
    weights[0][3, 7], scores[0][3, 7] = float("nan"), -60.0
    scores[0][0, 0] = float("nan")
    ours, plain = (run(weights, scores, name, seeds=[3]) for name in ("triton", "reference"))
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    assert not ours[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_scores_of_other_dtypes(dtype: torch.dtype) -> None:
    weights = [values(37, 45), values(5, 3, 3, 2)]
    scores = [values(*w.shape, seed=2).to(dtype) for w in weights]
    for options in ({"seeds": [1, 2]}, METHODS["threshold"]):
        ours, plain = (run(weights, scores, name, **options) for name in ("triton", "reference"))
        exact = run(
            [w.double() for w in weights], [s.double() for s in scores], "reference", **options
        )
        for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
            if i < 4:
                assert_same_bits(mine, theirs)
            else:
                assert_within_budget(mine, theirs, true)


def test_autocast_and_what_is_not_asked_for() -> None:
    weights = [values(37, 45), values(5, 3, 3, 2), values(9)]
    results = []
    for name in ("triton", "reference"):
        scores = [values(*w.shape, seed=2).requires_grad_() for w in weights]
        with torch.autocast("cpu", torch.float16):
            made = ops.learned_weights(weights, scores, seeds=[1, 2, 3], backend=name)
        assert made[0].dtype == torch.float16
        made[1].float().square().sum().backward()
        assert scores[0].grad is None and scores[2].grad is None
        results.append([*(w.detach() for w in made), scores[1].grad])
    for i, (mine, theirs) in enumerate(zip(*results, strict=True)):
        if i < 3:
            assert_same_bits(mine, theirs)
    exact = values(5, 3, 3, 2, seed=2).double().requires_grad_()
    half = weights[1].half().double()
    (made,) = ops.learned_weights([half], [exact], seeds=[2])
    made.square().sum().backward()
    assert_within_budget(results[0][3], results[1][3], exact.grad)


def test_while_a_graph_is_captured_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [values(37, 45), values(5, 3, 3, 2)]
    scores = [values(*w.shape, seed=2) for w in weights]
    want = run(weights, scores, "triton", seeds=[1, 2])
    monkeypatch.setattr(tables, "on_device", lambda *_: None)
    for one, other in zip(run(weights, scores, "triton", seeds=[1, 2]), want, strict=True):
        assert_same_bits(one, other)
