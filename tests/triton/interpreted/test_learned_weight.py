"""learned_weight in the interpreter: the reference's bits and weights, gradients within the error budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch
from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    non_contiguous,
    poisoned_memory,
    values,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (37,), (37, 45), (5, 3, 2, 3), (3, 1024), (0, 3)]
METHODS: dict[str, dict[str, Any]] = {
    "gumbel": {"method": "gumbel", "seed": 2**63 + 5, "samples": 3, "tau": 0.5},
    "gumbel tau 1": {"method": "gumbel", "seed": 3},
    "threshold": {"method": "threshold", "mu": 0.1},
    "topk": {"method": "topk", "density": 0.4},
}
HOW: dict[str, dict[str, Any]] = {
    "zero": {},
    "flip": {"off": "flip"},
    "scale": {"scale": "rsqrt_density"},
}


def run(w: Tensor, scores: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """W' and the gradients of weight and scores."""
    leaves = [t.detach().requires_grad_() for t in (w, scores)]
    out = ops.learned_weight(*leaves, backend=backend, **options)
    grad = values(*out.shape, seed=9, dtype=torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", METHODS)
def test_weight_and_gradients(
    method: str, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**METHODS[method], **HOW[how]}
    for shape in SHAPES:
        w = values(*shape, seed=1, dtype=torch.bfloat16).to(dtype)
        scores = values(*shape, seed=2)
        if w.dim() == 1:
            monkeypatch.setattr(launch, "wide", lambda _numel: True)
            w, scores = non_contiguous(w), non_contiguous(scores)
        with poisoned_memory():
            ours = run(w, scores, "triton", **options)
        plain = run(w, scores, "reference", **options)
        exact = run(w.double(), scores.double(), "reference", **options)
        if how != "scale":
            assert_same_bits(ours[0], plain[0])
        for mine, theirs, true in zip(ours, plain, exact, strict=True):
            assert_within_budget(mine, theirs, true)


@pytest.mark.parametrize("scores_dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_other_dtypes(method: str, scores_dtype: torch.dtype) -> None:
    w, scores = values(37, 45), values(37, 45, seed=2).to(scores_dtype)
    ours = run(w, scores, "triton", **METHODS[method])
    plain = run(w, scores, "reference", **METHODS[method])
    exact = run(w.double(), scores.double(), "reference", **METHODS[method])
    assert_same_bits(ours[0], plain[0])
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine, theirs, true)


@pytest.mark.parametrize("how", HOW)
def test_a_weight_that_is_no_number(how: str) -> None:
    """It gives its own score such a gradient and, where it is inactive and not flipped, nothing else."""
    w, scores = values(37, 45), values(37, 45, seed=2)
    w[3, 7], scores[3, 7] = float("nan"), -60.0
    options = {**METHODS["gumbel"], **HOW[how]}
    ours = run(w, scores, "triton", **options)
    for mine, theirs in zip(ours, run(w, scores, "reference", **options), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    if how != "flip":
        assert not ours[0].isnan().any() and ours[2].isnan().nonzero().tolist() == [[3, 7]]


def test_a_mask_of_nothing_recovers() -> None:
    w, scores = values(37, 45), torch.full((37, 45), -1.0)
    options = {"method": "threshold", "scale": "rsqrt_density"}
    ours, plain = (run(w, scores, name, **options) for name in ("triton", "reference"))
    assert not ours[0].any() and ours[2].any()
    exact = run(w.double(), scores.double(), "reference", **options)
    assert_within_budget(ours[2], plain[2], exact[2])


def test_float64_weights_are_refused_by_name() -> None:
    w = values(3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="computes in float32, bfloat16, float16"):
        ops.learned_weight(w, w, method="threshold", backend="triton")


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("tau", [1.0, 0.3, 1e-30, 1e30])
def test_slopes_of_all_logits(tau: float) -> None:
    """At temperature 1 by another formula; neither overflows, and only NaN gives NaN."""
    limits = torch.tensor([0.0, -0.0, 200.0, -200.0, 3e38, -3e38, float("inf"), -float("inf")])
    scores = torch.cat([limits, torch.tensor([float("nan")]), torch.linspace(-40, 40, 4096)])
    w = torch.ones_like(scores)
    options = {"method": "gumbel", "seed": 11, "tau": tau}
    ours, plain = (run(w, scores, name, **options)[2] for name in ("triton", "reference"))
    exact = run(w.double(), scores.double(), "reference", **options)[2]
    assert ours.isnan().nonzero().tolist() == [[8]]
    assert_within_budget(ours, plain, exact)
