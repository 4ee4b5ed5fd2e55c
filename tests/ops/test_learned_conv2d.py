"""learned_conv2d: by hand, against float64, the straight-through rule, and what it must survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from promises import unusable
from surrogate import SEED, VARIANTS, bits_of, name_of, surrogate_weights
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
# Name: shape of x, shape of the weight, options.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one": ((6, 1, 1, 1), (1, 1, 1, 1), {}),
    "1x1": ((6, 13, 5, 3), (9, 13, 1, 1), {"stride": 2}),
    "pairs": (
        (6, 4, 13, 11),
        (5, 4, 3, 2),
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
    ),
    "groups": ((6, 6, 9, 8), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((6, 5, 9, 7), (5, 1, 3, 3), {"groups": 5, "stride": 2, "padding": 1}),
    "same uneven": ((6, 4, 9, 7), (6, 2, 4, 2), {"padding": "same", "groups": 2}),
}
METHODS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": 7, "samples": 2},
    {"method": "threshold", "mu": 0.1},
    {"method": "topk", "density": 0.4},
]
HOW: list[dict[str, Any]] = [{}, {"off": "flip"}, {"scale": "rsqrt_density"}]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
every_method = pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])


def operands(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves x, weight, scores (float32 at least) and bias, and the options of the convolution."""
    x, w, where = CASES[case]
    scores = values(*w, seed=2, dtype=torch.promote_types(dtype, torch.float32))
    made = [values(*x, dtype=dtype), values(*w, seed=1, dtype=dtype), scores]
    made.append(values(w[0], seed=3, dtype=dtype))
    return [t.requires_grad_() for t in made], where


def learned(leaves: list[Tensor], **options: Any) -> Tensor:
    x, w, scores, bias = leaves
    return ops.learned_conv2d(x, w, scores, bias=bias, **options)


def straight_through(
    leaves: list[Tensor], where: dict[str, Any], *, relaxed: bool = False, **options: Any
) -> Tensor:
    """The written surrogate in plain torch."""
    x, w, scores, bias = leaves
    weights = surrogate_weights(w, scores, relaxed=relaxed, **options)
    parts = zip(x.tensor_split(len(weights)), weights, strict=True)
    return torch.cat([F.conv2d(part, one, bias, **where) for part, one in parts])


def all_of(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and the four gradients."""
    y = learned(leaves, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    w = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    scores = torch.tensor([[[[0.5, -1.0], [0.0, 2.0]]]], requires_grad=True)
    y = ops.learned_conv2d(x, w, scores, method="threshold", bias=torch.tensor([0.5]))
    assert y.tolist() == [[[[5001.5, 6002.5]]]]
    y.sum().backward()
    assert scores.grad is not None
    # G sums the inputs each entry meets: 1 + 2, 2 + 3, 4 + 5, 5 + 6. Inactive ones too.
    assert scores.grad.tolist() == [[[[3.0, 50.0], [900.0, 11000.0]]]]
    flipped = ops.learned_conv2d(x[0], w, scores, method="threshold", off="flip", mu=0.7)
    assert flipped.tolist() == [[[5000.0 - 400 - 20 - 1, 6000.0 - 500 - 30 - 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_variant
def test_forward_and_gradients_within_budget(variant: dict[str, Any], dtype: torch.dtype) -> None:
    for case in CASES:
        leaves, where = operands(case, dtype)
        if not bits_of(leaves[2].detach(), **variant).flatten(1).any(1).all():
            continue  # the plain expression has no rsqrt of density 0
        with poisoned_memory():
            y = learned(leaves, **where, **variant)
            dy = values(*y.shape, seed=4, dtype=dtype)
            grads = torch.autograd.grad(y, leaves, dy)
        results = []
        for kind in (dtype, torch.float64):
            same = [
                t.detach().to(torch.promote_types(kind, t.dtype)).requires_grad_() for t in leaves
            ]
            plain = straight_through(same, where, **variant)
            results.append((plain.detach(), *torch.autograd.grad(plain, same, dy.to(kind))))
        assert grads[2].dtype == torch.float32
        for got, reference, exact in zip((y, *grads), *results, strict=True):
            assert_within_budget(got.detach(), reference, exact)


@pytest.mark.parametrize("case", ["pairs", "groups", "depthwise", "same uneven"])
@every_variant
def test_gradients_are_those_of_the_written_surrogate(variant: dict[str, Any], case: str) -> None:
    leaves, where = operands(case, torch.float64)
    want = straight_through(leaves, where, **variant)
    dy = values(*want.shape, seed=4, dtype=torch.float64)
    got = learned(leaves, **where, **variant)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["method"] == "gumbel"], ids=name_of)
def test_the_relaxed_function_passes_gradcheck(variant: dict[str, Any]) -> None:
    leaves, where = operands("depthwise", torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: straight_through(list(t), where, relaxed=True, **variant), leaves, fast_mode=True
    )


@pytest.mark.parametrize("how", HOW, ids=str)
@every_method
def test_a_convolution_is_a_linear_layer_over_its_patches(
    options: dict[str, Any], how: dict[str, Any]
) -> None:
    (x, w, scores, bias), where = operands("pairs", torch.float64)
    y = learned([x, w, scores, bias], **where, **options, **how)
    patches = F.unfold(x, w.shape[2:], **where).transpose(1, 2)
    flat = ops.learned_linear(
        patches, w.flatten(1), scores.flatten(1), bias=bias, **options, **how
    )  # fmt: skip
    flat = flat.transpose(1, 2).unflatten(2, y.shape[2:])
    leaves = (x, w, scores, bias)
    pairs = zip(
        (y, *torch.autograd.grad(y.square().sum(), leaves)),
        (flat, *torch.autograd.grad(flat.square().sum(), leaves)),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@every_method
@pytest.mark.parametrize("how", HOW, ids=str)
def test_memory_format_does_not_matter(options: dict[str, Any], how: dict[str, Any]) -> None:
    leaves, where = operands("groups")
    want = all_of(leaves, **where, **options, **how)
    exact = all_of(
        [t.detach().double().requires_grad_() for t in leaves], **where, **options, **how
    )
    last = [t.detach().to(memory_format=LAST).requires_grad_() for t in leaves[:3]]
    strange = [non_contiguous(t.detach()).requires_grad_() for t in leaves]
    for tensors in ([*last, leaves[3]], [leaves[0], *last[1:], leaves[3]], strange):
        with poisoned_memory():
            got = all_of(tensors, **where, **options, **how)
        for ours, reference, truth in zip(got, want, exact, strict=True):
            assert_within_budget(ours, reference, truth)
    y = learned([*last, leaves[3]], **where, **options, **how)
    assert y.is_contiguous(memory_format=LAST)


def test_the_seed_rules() -> None:
    leaves, where = operands("groups")
    four = all_of([leaves[0].detach().repeat(2, 1, 1, 1).requires_grad_(), *leaves[1:]],
                  seed=3, samples=4, **where)  # fmt: skip
    again = all_of([leaves[0].detach().repeat(2, 1, 1, 1).requires_grad_(), *leaves[1:]],
                   seed=torch.tensor(3), samples=4, **where)  # fmt: skip
    for one, other in zip(four, again, strict=True):
        assert_same_bits(one, other)
    first = learned([leaves[0][:3], *leaves[1:]], seed=3, **where)
    assert_same_bits(first.detach(), four[0][:3])
    torch.manual_seed(1)
    drawn = learned(leaves, **where)
    assert not torch.equal(drawn, learned(leaves, **where))
    torch.manual_seed(1)
    assert_same_bits(learned(leaves, **where), drawn)
    before = torch.get_rng_state()
    for options in METHODS:
        learned(leaves, **options, **where)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [None, "rsqrt_density"])
def test_a_masked_out_weight_contributes_nothing(bad: float, scale: Any) -> None:
    (x, w, scores, bias), where = operands("depthwise")
    off = scores.detach() <= 0
    options = {"method": "threshold", "scale": scale, **where}
    spoilt, clean = (
        all_of([x, torch.where(off, v, w.detach()).requires_grad_(), scores, bias], **options)
        for v in (bad, 0.0)
    )
    ds = spoilt.pop(3)
    del clean[3]
    for ours, theirs in zip(spoilt, clean, strict=True):
        assert_same_bits(ours, theirs)
    assert ds[~off].isfinite().all(), "only its own score sees a spoilt weight"
    assert not ds[off].isfinite().any()


def test_empty_batches_one_image_and_a_mask_with_no_ones() -> None:
    (x, w, scores, bias), where = operands("groups")
    for options in METHODS:
        empty = x.detach()[:0].requires_grad_()
        y, dx, *rest = all_of([empty, w, scores, bias], **options, **where)
        assert y.shape == (0, 4, 9, 8)
        assert dx.shape == empty.shape
        assert [g.shape for g in rest] == [w.shape, scores.shape, bias.shape]
        assert not any(g.any() for g in rest)
    one = learned([x[0], w, scores, bias], seed=1, **where)
    assert_same_bits(one, learned([x[:1], w, scores, bias], seed=1, **where)[0])
    dead = torch.full_like(w, -9.0).requires_grad_()
    for how in HOW[::2]:
        y, *grads = all_of([x, w, dead, bias], method="threshold", **how, **where)
        assert torch.equal(y, bias[:, None, None].expand_as(y))
        assert all(g.isfinite().all() for g in grads)
        assert grads[2].any(), "its scores can recover"


def test_autocast_casts_all_but_the_scores() -> None:
    leaves, where = operands("groups")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y = learned(leaves, seed=1, **where)
    x, w, bias = (leaves[i].detach().bfloat16().requires_grad_() for i in (0, 1, 3))
    plain = learned([x, w, leaves[2], bias], seed=1, **where)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, plain)
    dy = values(*y.shape, seed=5).bfloat16()
    want = torch.autograd.grad(plain, (x, w, leaves[2], bias), dy)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), want, strict=True):
        assert ours.dtype == torch.float32
        assert_same_bits(ours, theirs.float())


def test_only_the_gradients_asked_for() -> None:
    leaves, where = operands("groups")
    want = all_of(leaves, seed=1, **where)[1:]
    for chosen, kept in ((0, False), (1, True), (2, True), (3, False)):
        tensors = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(leaves)]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            y = learned(tensors, seed=1, **where)
        assert (leaves[0].data_ptr() in saved) == kept
        (got,) = torch.autograd.grad(y.square().sum(), tensors[chosen])
        assert_same_bits(got, want[chosen])


@pytest.mark.parametrize("how", HOW, ids=str)
@every_method
def test_opcheck(options: dict[str, Any], how: dict[str, Any]) -> None:
    x, w, scores, bias = (t.detach() for t in operands("groups")[0])
    x = x.to(memory_format=LAST)
    gumbel = options["method"] == "gumbel"
    seed, samples = (torch.tensor(7), 2) if gumbel else (None, 1)
    where = ([1, 1], [1, 1], [1, 1], 2)
    off, rescale = how.get("off", "zero"), "scale" in how
    op = torch.ops.fastmask
    rest = (options["method"], samples, 0.1, options.get("density"), off, rescale, "auto")
    opcheck(op.learned_conv2d, (x, w, scores, bias, seed, *where, *rest))
    y, active = op.learned_conv2d(x, w, scores, bias, seed, *where, *rest)
    for wanted in ([True] * 4, [False, False, True, False], [True, False, False, False]):
        given = x if wanted[1] or wanted[2] else None
        rest = (options["method"], 1.0, off, rescale, wanted, "auto")
        opcheck(op.learned_conv2d_grad, (y, given, w, scores, active, seed, x.shape, *where, *rest))


@pytest.mark.parametrize("options", [{"samples": 2}, *METHODS[1:]], ids=str)
def test_compiled_whole_without_recompiling(options: dict[str, Any]) -> None:
    leaves, where = operands("same uneven")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(learned, fullgraph=True, backend=counter)
    for seed in (1, 2, 3):
        results = []
        for function in (learned, compiled):
            torch.manual_seed(seed)
            y = function(leaves, **where, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_functional_gradients_and_no_second_ones() -> None:
    leaves, where = operands("groups")
    x, w, scores, bias = (t.detach() for t in leaves)
    got = torch.func.grad(
        lambda s: learned([x, w, s, bias], seed=SEED, **where).square().sum()
    )(scores)  # fmt: skip
    y = learned(leaves, seed=SEED, **where).square().sum()
    (want,) = torch.autograd.grad(y, leaves[2], create_graph=True)
    assert_same_bits(got, want)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        want.sum().backward()


def test_what_it_refuses() -> None:
    x, w, scores, bias = (t.detach() for t in operands("groups")[0])

    def refuse(kind: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.learned_conv2d(*(args or (x, w, scores)), **{"groups": 2, **options})

    refuse(ValueError, r"scores: expected shape \(4, 3, 3, 3\)", x, w, scores[:-1])
    refuse(TypeError, "scores: expected dtype float32", x, w, scores.long())
    refuse(
        ValueError,
        r"scores: expected a tensor on (cpu|cuda:0) like weight",
        x,
        w,
        scores.to("meta"),
    )
    refuse(ValueError, r"x: expected shape \(B, 6, H, W\)", x[:, :5], w, scores)
    refuse(ValueError, r"weight: expected shape \(N, C", x, w[0], scores)
    refuse(TypeError, "weight: expected dtype torch.float32 like x", x, w.double(), scores)
    refuse(ValueError, r"bias: expected shape \(4,\)", bias=bias[:-1])
    refuse(ValueError, "method: expected one of", method="top-k")
    refuse(ValueError, "samples: expected at least 1, got 0", samples=0)
    refuse(ValueError, "number of masks that divides the 6 images of x, got 4", samples=4)
    refuse(ValueError, "divides the 1 images of x, got 2", x[0], w, scores, samples=2)
    refuse(ValueError, r"seed: expected a whole number in \[0, 2\*\*64\)", seed=-1)
    refuse(ValueError, "tau: expected a finite number above 0", tau=0.0)
    refuse(ValueError, "seed: an option of method='gumbel'", method="threshold", seed=1)
    refuse(ValueError, "density: method='topk' needs the share", method="topk")
    refuse(ValueError, "scale: expected None with off='flip'", off="flip", scale="rsqrt_density")
    refuse(ValueError, "stride: expected at least 1", stride=0)
    refuse(ValueError, "padding: expected one of 'same', 'valid'", padding="full")
    refuse(ValueError, "groups: expected a number that divides the 4 output", groups=3)
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", backend=unusable())
