"""learned_linear: by hand, against float64, the straight-through rule, and what it must survive."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import assert_as_promised
from surrogate import SEED, VARIANTS, bits_of, name_of, surrogate_weights
from torch import Tensor

from fastmask import ops
from fastmask.ops.sample_mask import reference as sampling
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    poisoned_memory,
    values,
)


def straight_through(
    x: Tensor, w: Tensor, scores: Tensor, bias: Tensor | None = None, *,
    relaxed: bool = False, groups: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The written surrogate in plain torch."""
    effective = surrogate_weights(w, scores, relaxed=relaxed, **options)
    if groups is None:
        parts = x.tensor_split(len(effective))
        return torch.cat(
            [F.linear(part, w, bias) for part, w in zip(parts, effective, strict=True)]
        )
    return torch.stack([F.linear(x[i], effective[groups[i]], bias) for i in range(len(x))])


def operands(n: int, k: int, b: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves x, weight, scores (float32 at least), bias."""
    scores = values(n, k, seed=2, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [
        values(b, k, dtype=dtype),
        values(n, k, seed=1, dtype=dtype),
        scores,
        values(n, seed=3, dtype=dtype),
    ]
    return [t.requires_grad_() for t in leaves]


def learned(leaves: list[Tensor], **options: Any) -> Tensor:
    x, w, scores, bias = leaves
    return ops.learned_linear(x, w, scores, bias=bias, **options)


def test_threshold_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    w = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    scores = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.1, -0.2]], requires_grad=True)
    bias = torch.tensor([0.5, -0.5])
    y = ops.learned_linear(x, w, scores, method="threshold", bias=bias)
    assert y.tolist() == [[301.5, 39.5]]
    y.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, 20.0, 300.0], [2.0, 40.0, 600.0]], "inactive ones too"
    flipped = ops.learned_linear(x, w, scores, method="threshold", off="flip", mu=0.3)
    assert flipped.tolist() == [[1.0 - 20.0 + 300.0, -2.0 - 40.0 - 600.0]]


def test_scale_by_hand() -> None:
    x, w = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    scores = torch.tensor([[1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    y = ops.learned_linear(x, w, scores, method="threshold", scale="rsqrt_density")
    assert y.tolist() == [[2.0]], "density 1/4, so that a = 2"
    y.sum().backward()
    # a G W - a^2 / (2 N) * sum(G W') = 2 W - 4 / 8 * 2.
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, 3.0, 7.0, 15.0]]


def test_topk_by_hand() -> None:
    x, w = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2]])
    assert ops.learned_linear(x, w, scores, method="topk", density=0.25).tolist() == [[2.0]]
    assert ops.learned_linear(x, w, scores, method="topk", density=0.75).tolist() == [[14.0]]


def test_gumbel_bits_are_those_of_sample_mask() -> None:
    w, logits = torch.ones(37, 45), values(37, 45)
    x = torch.eye(45).repeat(4, 1)
    y = ops.learned_linear(x, w, logits, seed=SEED, samples=4)
    masks = ops.unpack(ops.sample_mask(logits, SEED, 4), (37, 45))
    assert torch.equal(y.view(4, 45, 37).transpose(1, 2), masks.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_forward_and_gradients_within_budget(variant: dict[str, Any], dtype: torch.dtype) -> None:
    for n, k in ADVERSARIAL_SHAPES:
        leaves = operands(n, k, dtype=dtype)
        if not bits_of(leaves[2].detach(), **variant).flatten(1).any(1).all():
            continue  # the plain expression has no rsqrt of density 0; see test_a_mask_with_no_ones
        dy = values(6, n, seed=4, dtype=dtype)
        results = []
        for kind in (dtype, torch.float64):
            same = [
                t.detach().to(torch.promote_types(kind, t.dtype)).requires_grad_() for t in leaves
            ]
            y = straight_through(*same, **variant)
            results.append((y.detach(), *torch.autograd.grad(y, same, dy.to(kind))))
        with poisoned_memory():
            y = learned(leaves, **variant)
            grads = torch.autograd.grad(y, leaves, dy)
        assert grads[2].dtype == leaves[2].dtype
        for got, reference, exact in zip((y, *grads), *results, strict=True):
            assert_within_budget(got.detach(), reference, exact)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_gradients_are_those_of_the_written_surrogate(variant: dict[str, Any]) -> None:
    leaves = operands(7, 13, dtype=torch.float64)
    dy = values(6, 7, seed=4, dtype=torch.float64)
    want = torch.autograd.grad(straight_through(*leaves, **variant), leaves, dy)
    got = torch.autograd.grad(learned(leaves, **variant), leaves, dy)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["method"] == "gumbel"], ids=name_of)
def test_the_relaxed_function_passes_gradcheck(variant: dict[str, Any]) -> None:
    leaves = operands(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: straight_through(*t, relaxed=True, **variant), leaves
    )


def test_slope_of_one_entry_against_its_formula() -> None:
    logit, tau, w = 0.3, 0.5, 3.0
    scores = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    x, weight = torch.ones(4, 1, dtype=torch.float64), torch.full((1, 1), w, dtype=torch.float64)
    ops.learned_linear(x, weight, scores, seed=5, samples=4, tau=tau).sum().backward()
    total = 0.0
    for k in sampling.uniform24(1, torch.tensor(5), 4, 0).flatten().tolist():
        s = 1 / (1 + math.exp(-(logit + math.log(2**25 - 1 - 2 * k) - math.log(2 * k + 1)) / tau))
        total += w * s * (1 - s) / tau
    assert scores.grad is not None
    assert scores.grad.item() == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("logit, slope", [(0.0, 1 / 6), (2.0, 0.11333), (-2.0, 0.11333)])
def test_mean_gradient_is_the_oracle(logit: float, slope: float) -> None:
    n = 200_000
    scores = torch.full((1, n), logit, dtype=torch.float64, requires_grad=True)
    ops.learned_linear(
        torch.ones(1, n).double(), torch.ones(1, n).double(), scores, seed=3
    ).backward()
    assert scores.grad is not None
    error = scores.grad.std() / math.sqrt(n)
    assert abs(scores.grad.mean() - slope) < 5 * error + 5e-6  # the oracle has five digits


@given(
    st.integers(0, 2**64 - 1), st.integers(1, 4), st.sampled_from(["zero", "flip", "rsqrt_density"])
)
def test_a_call_of_many_samples_is_many_calls_of_one(seed: int, samples: int, how: str) -> None:
    options: dict[str, Any] = {"scale": how} if how == "rsqrt_density" else {"off": how}
    leaves = operands(5, 9, b=3, dtype=torch.float64)
    x, w, scores, bias = leaves
    many = [x.detach().repeat(samples, 1).requires_grad_(), w, scores, bias]
    y = learned(many, seed=seed, samples=samples, **options)
    first = learned(leaves, seed=seed, **options)
    assert_same_bits(y[:3], first)
    grads = torch.autograd.grad(y.sum() / samples, [w, scores])
    mean = [torch.zeros_like(w), torch.zeros_like(scores)]
    for i in range(samples):
        groups = torch.full((3,), i)
        one = learned(leaves, seed=seed, samples=samples, groups=groups, **options)
        torch.testing.assert_close(one, y[3 * i : 3 * i + 3], rtol=1e-13, atol=1e-13)
        for total, part in zip(mean, torch.autograd.grad(one.sum(), [w, scores]), strict=True):
            total += part / samples
    torch.testing.assert_close(list(grads), mean, rtol=1e-12, atol=1e-12)


def test_groups_name_the_sample_of_each_row() -> None:
    leaves = operands(37, 45, b=8, dtype=torch.float64)
    groups = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2])
    options: dict[str, Any] = {
        "method": "gumbel",
        "seed": SEED,
        "samples": 3,
        "scale": "rsqrt_density",
    }
    dy = values(8, 37, seed=4, dtype=torch.float64)
    got, want = (
        learned(leaves, groups=groups, **options),
        straight_through(*leaves, groups=groups, **options),
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_all_active_is_linear() -> None:
    x, w, _, bias = operands(37, 45)
    ones, exact = torch.ones(37, 45), F.linear(x.double(), w.double(), bias.double())
    for options in ({"method": "threshold"}, {"method": "topk", "density": 1.0}):
        for extra in ({}, {"off": "flip"}, {"scale": "rsqrt_density"}):
            y = ops.learned_linear(x, w, ones, bias=bias, **options, **extra)  # type: ignore[arg-type]
            assert_as_promised(y, F.linear(x, w, bias), exact)
    certain = ops.learned_linear(x, w, 100 * ones, bias=bias)
    assert_as_promised(certain, F.linear(x, w, bias), exact)


@pytest.mark.parametrize("scale", [None, "rsqrt_density"])
def test_a_mask_with_no_ones_gives_the_bias_and_can_recover(scale: Any) -> None:
    x, w, _, bias = operands(5, 9, dtype=torch.float64)
    scores = torch.full((5, 9), -1.0, dtype=torch.float64, requires_grad=True)
    y = ops.learned_linear(x, w, scores, method="threshold", scale=scale, bias=bias)
    assert_same_bits(y, bias.expand(6, -1).contiguous())
    (got,) = torch.autograd.grad(y.sum(), scores)
    # Scaled as a mask of one entry is, a = sqrt(N K): the change that turning it on would make.
    a = math.sqrt(45) if scale else 1.0
    torch.testing.assert_close(got, a * x.sum(0) * w, rtol=1e-13, atol=1e-13)
    one = torch.where(torch.arange(45).view(5, 9) == 7, 1.0, scores.detach())
    step = ops.learned_linear(x, w, one, method="threshold", scale=scale, bias=bias) - y
    torch.testing.assert_close(step.sum(), got[0, 7], rtol=1e-12, atol=1e-12)
