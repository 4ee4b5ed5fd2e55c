"""learned_weights: by hand, each as learned_weight by itself, gradients, seeds, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from promises import unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

LAST = torch.channels_last
SHAPES = [(1, 1), (5, 1), (3, 8), (7, 64), (37, 45), (5, 3, 3, 2), (9, 8, 3, 3), (0, 3), (7,)]
METHODS: list[dict[str, Any]] = [
    {"method": "gumbel", "tau": 0.7},
    {"method": "gumbel", "off": "flip"},
    {"method": "threshold", "mu": 0.1},
    {"method": "topk", "density": 0.4, "off": "flip"},
]
SEEDS = [2**63 + 5 * i for i in range(len(SHAPES))]
every_method = pytest.mark.parametrize(
    "options", METHODS, ids=lambda o: "-".join(map(str, o.values()))
)


def operands(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Leaves: weights and scores (float32 at least) of all shapes."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        [values(*s, seed=i, dtype=kind).requires_grad_() for i, s in enumerate(SHAPES, start)]
        for start, kind in ((0, dtype), (50, wide))
    ]


def operands_of(leaves: list[list[Tensor]]) -> list[list[Tensor]]:
    """The same values in float64."""
    return [[t.detach().double().requires_grad_() for t in some] for some in leaves]


def run(leaves: list[list[Tensor]], options: dict[str, Any], backend: str = "auto") -> list[Tensor]:
    """Weights and the gradients of weights and scores."""
    seeds = SEEDS if options["method"] == "gumbel" else None
    with poisoned_memory():
        made = ops.learned_weights(*leaves, seeds=seeds, backend=backend, **options)
        upstream = [values(*w.shape, seed=i, dtype=w.dtype) for i, w in enumerate(made, 90)]
        grads = torch.autograd.grad(made, [*leaves[0], *leaves[1]], upstream)
    return [*made, *grads]


def each(
    leaves: list[list[Tensor]], options: dict[str, Any], backend: str = "auto"
) -> list[Tensor]:
    """The same by learned_weight."""
    made, of_weights, of_scores = [], [], []
    for i, (w, scores) in enumerate(zip(*leaves, strict=True)):
        seed = {"seed": SEEDS[i]} if options["method"] == "gumbel" else {}
        (one,) = ops.learned_weight(w, scores, **seed, **options)
        upstream = values(*one.shape, seed=90 + i, dtype=one.dtype)
        dw, dscores = torch.autograd.grad(one, (w, scores), upstream)
        made.append(one)
        of_weights.append(dw)
        of_scores.append(dscores)
    return [*made, *of_weights, *of_scores]


def test_by_hand() -> None:
    weights = [torch.tensor([1.0, 10.0, 100.0]), torch.tensor([[float("nan")], [4.0]])]
    scores = [
        torch.tensor([0.5, -1.0, 0.0]).requires_grad_(),
        torch.tensor([[-1.0], [1.0]]).requires_grad_(),
    ]
    made = ops.learned_weights(weights, scores, method="threshold")
    assert [one.tolist() for one in made] == [[1.0, 0.0, 0.0], [[0.0], [4.0]]]
    (made[0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores[0].grad is not None and scores[0].grad.tolist() == [1.0, 20.0, 300.0]
    assert scores[1].grad is None, "its weight was not used"
    flipped = ops.learned_weights(weights[:1], scores[:1], method="topk", density=1 / 3, off="flip")
    assert flipped[0].tolist() == [1.0, -10.0, -100.0]
    assert ops.learned_weights([], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_method
def test_each_as_learned_weight_by_itself(options: dict[str, Any], dtype: torch.dtype) -> None:
    leaves = operands(dtype)
    for one, other in zip(run(leaves, options), each(leaves, options), strict=True):
        assert_same_bits(one, other)


@every_method
def test_memory_formats(options: dict[str, Any]) -> None:
    leaves = operands()
    want = run(leaves, options)
    exact = run(operands_of(leaves), options)
    last = [
        [t.detach().to(memory_format=LAST).requires_grad_() if t.dim() == 4 else t for t in some]
        for some in leaves
    ]
    strange = [[non_contiguous(t.detach()).requires_grad_() for t in some] for some in leaves]
    for given in (last, strange, [last[0], leaves[1]], [leaves[0], last[1]]):
        got = run(given, options)
        like = [*given[0], *given[0], *given[1]]
        for i, (one, other, true, t) in enumerate(zip(got, want, exact, like, strict=True)):
            assert one.stride() == torch.empty_like(t).stride()
            if i < 2 * len(SHAPES):
                assert_same_bits(one, other)
            else:
                # torch's exp has other last bits at the end of a row than within it.
                assert_within_budget(one, other, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
def test_against_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Its bits of the weights and their gradients; the scores' gradients keep the budget."""
    leaves = operands(dtype)
    got, plain = run(leaves, options), run(leaves, options, "reference")
    exact = run(operands_of(leaves), options)
    for i, (one, other, true) in enumerate(zip(got, plain, exact, strict=True)):
        if i < 2 * len(SHAPES):
            assert_same_bits(one, other)
        else:
            assert_within_budget(one, other, true)


def test_masked_out_weights_may_be_anything() -> None:
    weights, scores = ([t.detach() for t in some] for some in operands())
    ones = [torch.ones_like(w) for w in weights]
    drawn = ops.learned_weights(ones, scores, seeds=SEEDS)
    for strange in (float("nan"), float("inf")):
        other = [torch.where(m != 0, w, strange) for m, w in zip(drawn, weights, strict=True)]
        for got, want in zip(
            ops.learned_weights(other, scores, seeds=SEEDS),
            ops.learned_weights(weights, scores, seeds=SEEDS),
            strict=True,
        ):
            assert_same_bits(got, want)


def test_bits_are_those_of_sample_mask() -> None:
    weights, scores = ([t.detach() for t in some] for some in operands())
    seeds = torch.tensor([s - 2**64 for s in SEEDS])
    rest = (seeds, "gumbel", 0.0, None, "zero", torch.float32, "auto")
    _, active = torch.ops.fastmask.learned_weights(weights, scores, *rest)
    for bits, logits, seed in zip(active, scores, SEEDS, strict=True):
        assert torch.equal(bits, ops.sample_mask(logits, seed)[0])


def test_seeds() -> None:
    weights, scores = operands()
    torch.manual_seed(3)
    one, two = (ops.learned_weights(weights, scores) for _ in range(2))
    assert not torch.equal(one[4], two[4])
    torch.manual_seed(3)
    for a, b in zip(ops.learned_weights(weights, scores), one, strict=True):
        assert_same_bits(a, b)
    torch.manual_seed(3)
    drawn = list(ops.draw_seed(scores[0], [len(scores)]))
    if scores[0].is_cpu:
        torch.manual_seed(3)
        assert drawn == [ops.draw_seed(scores[0]) for _ in scores]
    for given in (drawn, torch.stack(drawn), [int(seed) % 2**64 for seed in drawn]):
        for a, b in zip(ops.learned_weights(weights, scores, seeds=given), one, strict=True):
            assert_same_bits(a, b)
    before = torch.get_rng_state()
    ops.learned_weights(weights, scores, method="threshold")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@every_method
def test_autocast_rounds_the_weight_first(options: dict[str, Any], kind: torch.dtype) -> None:
    leaves = operands()
    with torch.autocast(leaves[0][0].device.type, kind):
        got = run(leaves, options)
    rounded = [[t.detach().to(kind).requires_grad_() for t in leaves[0]], leaves[1]]
    for one, other in zip(got, each(rounded, options), strict=True):
        assert_same_bits(one.to(other.dtype), other)
    assert all(g.dtype == torch.float32 for g in got[len(SHAPES) :])


def test_what_is_not_asked_for() -> None:
    weights, scores = operands()
    weights[4].requires_grad_(False)
    made = ops.learned_weights(weights[3:5], scores[3:5], seeds=[1, 2])
    assert made[1].requires_grad
    torch.autograd.backward([made[1]], [torch.ones_like(made[1])])
    assert scores[4].grad is not None and weights[4].grad is None
    assert weights[3].grad is None and scores[3].grad is None
    frozen = [scores[4].detach()]
    assert not ops.learned_weights(weights[4:5], frozen, method="threshold")[0].requires_grad


@pytest.mark.parametrize("options", METHODS[:3:2], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    weights, scores = ([t.detach() for t in some[5:8]] for some in operands())
    gumbel, off = options["method"] == "gumbel", options.get("off", "zero")
    seeds = torch.arange(len(weights)) if gumbel else None
    forward, backward = torch.ops.fastmask.learned_weights, torch.ops.fastmask.learned_weights_grad
    rest = (seeds, options["method"], 0.1, options.get("density"), off, torch.float32, "auto")
    opcheck(forward, (weights, scores, *rest))
    made, active = forward(weights, scores, *rest)
    made[1] = made[1].new_empty(0)
    for wanted in ([True, True], [False, True], [True, False]):
        rest = (seeds, options["method"], 0.5, off, wanted, "auto")
        opcheck(backward, (made, weights, scores, active, *rest))


@pytest.mark.parametrize("options", [{}, METHODS[2]], ids=str)
def test_compiled_whole(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    weights, scores = (some[4:6] for some in operands())
    compiled = torch.compile(
        lambda w, s: ops.learned_weights(w, s, **options), fullgraph=True, backend="aot_eager"
    )
    for seed in (1, 2):
        results = []
        for function in (lambda w, s: ops.learned_weights(w, s, **options), compiled):
            torch.manual_seed(seed)
            made = function(weights, scores)
            total = torch.stack([one.square().sum() for one in made]).sum()
            results.append([*made, *torch.autograd.grad(total, [*weights, *scores])])
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)


def test_what_it_refuses() -> None:
    w, s = values(5, 7), values(5, 7, seed=1)
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (w, [s], {}, TypeError, "weights: expected a list of tensors, got Tensor"),
        ([w], s, {}, TypeError, "scores: expected a list of tensors, got Tensor"),
        ([w, w], [s], {}, ValueError, "scores: expected 2 elements, one for each of weights, got 1"),
        ([w, w.double()], [s, s], {}, TypeError, r"weights\[1\]: expected dtype torch.float32"),
        ([w, w], [s, s.double()], {}, TypeError, r"scores\[1\]: expected dtype torch.float32"),
        ([w], [s.long()], {}, TypeError, r"scores\[0\]: expected dtype float32"),
        ([w], [s[:4]], {}, ValueError, r"scores\[0\]: expected shape \(5, 7\)"),
        ([w], [s], {"seeds": [1, 2]}, ValueError, "seeds: expected 1 elements"),
        ([w], [s], {"seeds": torch.tensor(1)}, TypeError, r"seeds: expected an int64 tensor of shape \(1,\)"),
        ([w], [s], {"seeds": torch.ones(1)}, TypeError, "seeds: expected an int64 tensor"),
        ([w], [s], {"seeds": 3}, TypeError, "seeds: expected a list or a tensor, got int"),
        ([w], [s], {"seeds": [2**64]}, ValueError, "seed: expected a whole number"),
        ([w], [s], {"mu": 0.5}, ValueError, "mu: an option of method='threshold'"),
        ([w], [s], {"method": "threshold", "seeds": [1]}, ValueError, "seeds: an option of method='gu"),
        ([w], [s], {"method": "topk"}, ValueError, "density: method='topk' needs"),
        ([w], [s], {"off": "on"}, ValueError, "off: expected one of"),
    ]  # fmt: skip
    for weights, scores, how, error, said in cases:
        with pytest.raises(error, match=said):
            ops.learned_weights(weights, scores, **how)
    with pytest.raises(BackendUnavailable, match="learned_weights"):
        ops.learned_weights([w], [s], backend=unusable())
    scores = [s.requires_grad_()]
    total = ops.learned_weights([w], scores, seeds=[1])[0].square().sum()
    (first,) = torch.autograd.grad(total, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
