"""learned_weight: by hand, against float64, as learned_linear reads it, and what it must survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from promises import unusable
from surrogate import SEED, VARIANTS, name_of, surrogate_weights
from torch import Tensor

from fastmask import ops
from fastmask._backend import missing
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

SHAPES: tuple[tuple[int, ...], ...] = ((1,), (37,), (37, 45), (5, 3, 2, 3), (2, 64), (0, 3))
METHODS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": 7, "samples": 2},
    {"method": "threshold", "mu": 0.1},
    {"method": "topk", "density": 0.4},
]
HOW: list[dict[str, Any]] = [{}, {"off": "flip"}, {"scale": "rsqrt_density"}]
NAN, INF = float("nan"), float("inf")
every_method = pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves weight and scores (float32 at least)."""
    wide = torch.promote_types(dtype, torch.float32)
    made = [values(*shape, seed=1, dtype=dtype), values(*shape, seed=2, dtype=wide)]
    return [t.requires_grad_() for t in made]


def test_by_hand() -> None:
    w = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    scores = torch.tensor([0.5, -1.0, 0.0, 2.0], requires_grad=True)
    y = ops.learned_weight(w, scores, method="threshold")
    assert y.tolist() == [[1.0, 0.0, 0.0, 1000.0]]
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [1.0, 20.0, 300.0, 4000.0], "inactive ones too"
    flipped = ops.learned_weight(w, scores, method="topk", density=0.25, off="flip")
    assert flipped.tolist() == [[-1.0, -10.0, -100.0, 1000.0]]
    scaled = ops.learned_weight(w, scores, method="topk", density=0.25, scale="rsqrt_density")
    assert scaled.tolist() == [[0.0, 0.0, 0.0, 2000.0]], "density 1/4, so that a = 2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_variant
def test_forward_and_gradients_within_budget(variant: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in ((37, 45), (5, 3, 2, 3), (64,)):
        leaves = operands(*shape, dtype=dtype)
        with poisoned_memory():
            y = ops.learned_weight(*leaves, **variant)
            dy = values(*y.shape, seed=4, dtype=dtype)
            grads = torch.autograd.grad(y, leaves, dy)
        results = []
        for kind in (dtype, torch.float64):
            same = [
                t.detach().to(torch.promote_types(kind, t.dtype)).requires_grad_() for t in leaves
            ]
            plain = surrogate_weights(*same, **variant)
            results.append((plain.detach(), *torch.autograd.grad(plain, same, dy.to(kind))))
        assert y.dtype == grads[0].dtype == dtype and grads[1].dtype == torch.float32
        for got, reference, exact in zip((y, *grads), *results, strict=True):
            assert_within_budget(got.detach(), reference, exact)


@every_variant
def test_gradients_are_those_of_the_written_surrogate(variant: dict[str, Any]) -> None:
    leaves = operands(7, 13, dtype=torch.float64)
    want = surrogate_weights(*leaves, **variant)
    dy = values(*want.shape, seed=4, dtype=torch.float64)
    got = ops.learned_weight(*leaves, **variant)
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    for ours, theirs in zip(
        *(torch.autograd.grad(y, leaves, dy) for y in (got, want)), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@every_variant
def test_it_is_the_weight_that_learned_linear_reads(variant: dict[str, Any]) -> None:
    weight, scores = operands(37, 45)
    x = values(6, 45)
    weights = ops.learned_weight(weight, scores, **variant)
    assert weights.shape == (variant.get("samples", 1), 37, 45)
    pairs = list(zip(x.chunk(len(weights)), weights.detach(), strict=True))
    plain = torch.cat([F.linear(part, w) for part, w in pairs])
    exact = torch.cat([F.linear(part.double(), w.double()) for part, w in pairs])
    y = ops.learned_linear(x, weight, scores, **variant)
    assert_within_budget(y.detach(), plain, exact)


@every_method
@pytest.mark.parametrize("how", HOW, ids=str)
def test_shapes_and_strides(options: dict[str, Any], how: dict[str, Any]) -> None:
    for shape in SHAPES:
        leaves = operands(*shape)
        y = ops.learned_weight(*leaves, **options, **how)
        assert y.shape == (options.get("samples", 1), *shape) and y.is_contiguous()
        grads = torch.autograd.grad(y.square().sum(), leaves)
        assert [g.shape for g in grads] == [shape, shape]
        strided = [non_contiguous(t.detach()).requires_grad_() for t in leaves]
        again = ops.learned_weight(*strided, **options, **how)
        assert_same_bits(again, y)
        for a, b in zip(torch.autograd.grad(again.square().sum(), strided), grads, strict=True):
            assert_same_bits(a, b)


@every_method
def test_masked_out_weights_may_be_anything(options: dict[str, Any]) -> None:
    weight, scores = (t.detach() for t in operands(37, 45))
    ones = ops.learned_weight(torch.ones(37, 45), scores, **options).bool()
    out = ~ones.any(0)
    assert out.any() and ones.any()
    for strange in (NAN, INF):
        other = torch.where(out, strange, weight)
        assert_same_bits(
            ops.learned_weight(other, scores, **options),
            ops.learned_weight(weight, scores, **options),
        )


def test_seeds() -> None:
    weight, scores = operands(37, 45)
    torch.manual_seed(3)
    one, two = (ops.learned_weight(weight, scores, samples=2) for _ in range(2))
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    torch.manual_seed(3)
    assert_same_bits(ops.learned_weight(weight, scores, samples=2), one)
    bits = ops.unpack(ops.sample_mask(scores, SEED, 2), scores.shape)
    drawn = ops.learned_weight(torch.ones(37, 45), scores, seed=SEED, samples=2)
    assert torch.equal(drawn, bits.float())
    before = torch.get_rng_state()
    ops.learned_weight(weight, scores, method="threshold")
    assert torch.equal(torch.get_rng_state(), before)


@every_method
@pytest.mark.parametrize("how", HOW, ids=str)
def test_opcheck(options: dict[str, Any], how: dict[str, Any]) -> None:
    weight, scores = (t.detach() for t in operands(5, 3, 2, 3))
    gumbel = options["method"] == "gumbel"
    seed, samples = (torch.tensor(7), 2) if gumbel else (None, 1)
    off, rescale = how.get("off", "zero"), "scale" in how
    forward, backward = torch.ops.fastmask.learned_weight, torch.ops.fastmask.learned_weight_grad
    rest = (options["method"], samples, 0.1, options.get("density"), off, rescale, "auto")
    opcheck(forward, (weight, scores, seed, *rest))
    dy, active = values(samples, 5, 3, 2, 3), ops.sample_mask(scores, 7, samples)
    for wanted in ([True, True], [False, True], [True, False]):
        rest = (options["method"], 1.0, off, rescale, wanted, "auto")
        opcheck(backward, (dy, weight, scores, active, seed, *rest))


@pytest.mark.parametrize("options", [{"samples": 2}, *METHODS[1:]], ids=str)
def test_compiled_whole_without_recompiling(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    tensors = operands(37, 45)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.learned_weight, fullgraph=True, backend=counter)
    for seed in (1, 2, 3):
        results = []
        for function in (ops.learned_weight, compiled):
            torch.manual_seed(seed)
            y = function(*tensors, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1


@pytest.mark.skipif(missing("cpu") is not None, reason=f"no CPU engine: {missing('cpu')}")
@every_variant
def test_the_engine_has_the_references_bits(variant: dict[str, Any]) -> None:
    """Of the weight and its gradient; the scores' gradient keeps the error budget."""
    for shape in SHAPES:
        leaves = operands(*shape)
        results = []
        for backend in ("reference", "cpu"):
            y = ops.learned_weight(*leaves, **variant, backend=backend)
            results.append((y, torch.autograd.grad(y.square().sum(), leaves[0])[0]))
        for want, got in zip(*results, strict=True):
            assert_same_bits(got, want)


def test_what_it_refuses() -> None:
    weight, scores = operands(5, 3)
    with pytest.raises(TypeError, match="weight: expected dtype float32"):
        ops.learned_weight(torch.ones(2).int(), torch.ones(2))
    with pytest.raises(ValueError, match="weight: expected at least one dimension"):
        ops.learned_weight(torch.ones(()), torch.ones(()))
    with pytest.raises(ValueError, match=r"scores: expected shape \(5, 3\)"):
        ops.learned_weight(weight, scores[:4])
    with pytest.raises(ValueError, match="mu: an option of method='threshold'"):
        ops.learned_weight(weight, scores, mu=0.1)
    with pytest.raises(ValueError, match="scale: expected None with off='flip'"):
        ops.learned_weight(weight, scores, off="flip", scale="rsqrt_density")
    with pytest.raises(BackendUnavailable, match="learned_weight"):
        ops.learned_weight(weight, scores, backend=unusable())
    y = ops.learned_weight(weight, scores, seed=1).square().sum()
    (first,) = torch.autograd.grad(y, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
