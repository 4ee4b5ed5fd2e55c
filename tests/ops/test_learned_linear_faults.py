"""learned_linear: seeds, compiled code, autocast, odd memory, spoilt values, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from promises import unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import assert_same_bits, non_contiguous, opcheck, poisoned_memory, values

METHODS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": 7},
    {"method": "threshold", "mu": 0.1},
    {"method": "topk", "density": 0.4},
]
HOW: list[dict[str, Any]] = [{}, {"off": "flip"}, {"scale": "rsqrt_density"}]
NAN, INF = float("nan"), float("inf")


def leaves(n: int = 37, k: int = 45, b: int = 6) -> list[Tensor]:
    """x, weight, scores, bias."""
    made = [values(b, k), values(n, k, seed=1), values(n, k, seed=2), values(n, seed=3)]
    return [t.requires_grad_() for t in made]


def call(
    x: Tensor, w: Tensor, scores: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    return ops.learned_linear(x, w, scores, bias=bias, **options)


def all_of(x: Tensor, w: Tensor, scores: Tensor, bias: Tensor, **options: Any) -> list[Tensor]:
    """Output and the four gradients."""
    y = call(x, w, scores, bias, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w, scores, bias))]


def test_same_seed_same_result_and_sample_0_is_the_only_sample() -> None:
    x, w, scores, bias = leaves(b=8)
    four = all_of(x, w, scores, bias, seed=3, samples=4)
    for one, other in zip(four, all_of(x, w, scores, bias, seed=3, samples=4), strict=True):
        assert_same_bits(one, other)
    assert_same_bits(call(x[:2], w, scores, bias, seed=3), four[0][:2])
    assert not torch.equal(four[0][2:4], call(x[2:4], w, scores, bias, seed=3))
    as_tensor = call(x, w, scores, bias, seed=torch.tensor(3), samples=4)
    assert_same_bits(as_tensor, four[0])


def test_manual_seed_rules_and_only_gumbel_draws() -> None:
    x, w, scores, _ = leaves()
    torch.manual_seed(1)
    first, second = call(x, w, scores), call(x, w, scores)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_same_bits(call(x, w, scores), first)
    before = torch.get_rng_state()
    call(x, w, scores, method="threshold")
    call(x, w, scores, method="topk", density=0.5)
    call(x, w, scores, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_memory_layout_does_not_matter(options: dict[str, Any], how: dict[str, Any]) -> None:
    tensors = leaves()
    want = all_of(*tensors, **options, **how)
    with poisoned_memory():
        strange = [non_contiguous(t.detach()).requires_grad_() for t in tensors]
        strange[1] = strange[1].detach().T.contiguous().T.requires_grad_()
        got = all_of(*strange, **options, **how)
    # Strides choose the product's order of summation, and nothing else: K and B terms of float32.
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=45 * 2**-24 * float(theirs.abs().max())
        )


def test_leading_dimensions_and_empty_batches() -> None:
    x, w, scores, bias = leaves(b=12)
    y = call(x, w, scores, bias, seed=1, samples=2)
    assert_same_bits(
        call(x.view(2, 3, 2, 45), w, scores, bias, seed=1, samples=2), y.view(2, 3, 2, 37)
    )
    assert_same_bits(call(x[0], w, scores, bias, seed=1), call(x[:1], w, scores, bias, seed=1)[0])
    groups = torch.tensor([0, 1] * 6)
    nested = call(x.view(3, 4, 45), w, scores, seed=1, samples=2, groups=groups.view(3, 4))
    assert_same_bits(nested.view(12, 37), call(x, w, scores, seed=1, samples=2, groups=groups))
    for options in METHODS:
        y, dx, dw, ds, db = all_of(x[:0], w, scores, bias, **options)
        assert y.shape == (0, 37)
        assert dx.shape == (0, 45)
        assert not dw.any()
        assert not ds.any()
        assert not db.any()


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (1, 1)])
def test_weights_of_no_or_one_element(shape: tuple[int, int], how: dict[str, Any]) -> None:
    tensors = leaves(*shape)
    for options in METHODS:
        y, *grads = all_of(*tensors, **options, **how)
        assert y.shape == (6, shape[0])
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        assert all(g.isfinite().all() for g in grads)
    nested = call(tensors[0].view(2, 3, -1), tensors[1], tensors[2], seed=1) if shape[1] else None
    assert nested is None or nested.shape == (2, 3, shape[0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("scale", [None, "rsqrt_density"])
def test_a_masked_out_weight_contributes_nothing(bad: float, scale: Any) -> None:
    x, w, scores, bias = leaves()
    off = scores.detach() <= 0
    spoilt = torch.where(off, bad, w.detach()).requires_grad_()
    clean = torch.where(off, 0.0, w.detach()).requires_grad_()
    options: dict[str, Any] = {"method": "threshold", "scale": scale}
    got = all_of(x, spoilt, scores, bias, **options)
    ds = got.pop(3)
    want = all_of(x, clean, scores, bias, **options)
    del want[3]
    for ours, theirs in zip(got, want, strict=True):
        assert_same_bits(ours, theirs)
    assert ds[~off].isfinite().all(), "only its own score sees a spoilt weight"
    assert not ds[off].isfinite().any()


def test_scores_that_are_no_numbers_or_have_no_bound() -> None:
    x, w = torch.ones(1, 4), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    scores = torch.tensor([[NAN, INF, -INF, INF]], requires_grad=True)
    for options in METHODS[:2]:
        assert call(x, w, scores, **options).tolist() == [[10.0]]
    assert call(x, w, scores, method="topk", density=0.75).tolist() == [[11.0]], "NaN ranks as -inf"
    call(x, w, scores, seed=1).backward()
    assert scores.grad is not None
    assert scores.grad[0, 1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("tau", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_temperatures_give_finite_gradients(tau: float) -> None:
    x, w, scores, bias = leaves()
    y, _, _, ds, _ = all_of(x, w, scores, bias, seed=1, tau=tau)
    assert_same_bits(y, call(x, w, scores, bias, seed=1).detach())
    assert ds.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_another_dtype(dtype: torch.dtype) -> None:
    x, w, scores, bias = leaves()
    other = scores.detach().to(dtype).requires_grad_()
    y, _, _, ds, _ = all_of(x, w, other, bias, seed=1)
    assert ds.dtype == dtype
    assert_same_bits(y, call(x, w, other.detach().float(), bias, seed=1).detach())


def test_autocast_casts_all_but_the_scores() -> None:
    x, w, scores, bias = leaves()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y = call(x, w, scores, bias, seed=1)
    low = [t.detach().bfloat16().requires_grad_() for t in (x, w, bias)]
    plain = call(low[0], low[1], scores, low[2], seed=1)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, plain)
    dy = values(6, 37, seed=5).bfloat16()
    dx, dw, ds = torch.autograd.grad(y, (x, w, scores), dy)
    want = torch.autograd.grad(plain, (low[0], low[1], scores), dy)
    assert (dx.dtype, dw.dtype, ds.dtype) == (torch.float32,) * 3
    assert_same_bits(ds, want[2])
    assert_same_bits(dx, want[0].float())
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert call(x.double(), w.double(), scores, seed=1).dtype == torch.float64


def test_half_precision_sums_are_float32() -> None:
    # 4097 equal terms: a running sum in bfloat16 stops at 256, a product rounded to it ends at 4096.
    x, w = torch.ones(4097, 1).bfloat16(), torch.ones(1, 1).bfloat16()
    scores = torch.ones(1, 1, requires_grad=True)
    call(x, w, scores, method="threshold").sum().backward()
    assert scores.grad is not None
    assert scores.grad.item() == 4097


def test_only_the_gradients_asked_for() -> None:
    x, w, scores, bias = leaves()
    want = all_of(x, w, scores, bias, seed=1)[1:]
    for chosen in range(4):
        tensors = [
            t.detach().requires_grad_(i == chosen) for i, t in enumerate((x, w, scores, bias))
        ]
        (got,) = torch.autograd.grad(call(*tensors, seed=1).square().sum(), tensors[chosen])
        assert_same_bits(got, want[chosen])
    # The input is kept for the sake of the weight and the scores alone.
    for needy, kept in ((0, False), (1, True), (2, True), (3, False)):
        tensors = [
            t.detach().requires_grad_(i == needy) for i, t in enumerate((x, w, scores, bias))
        ]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            call(*tensors, seed=1)
        assert (x.data_ptr() in saved) == kept
    frozen = [t.detach() for t in (x, w, scores)]
    assert not call(*frozen, seed=1).requires_grad


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_opcheck(options: dict[str, Any], how: dict[str, Any]) -> None:
    x, w, scores, bias = leaves()
    dy, groups = values(6, 37), torch.tensor([0, 1, 0, 1, 1, 1])
    gumbel = options["method"] == "gumbel"
    seed, samples = (torch.tensor(7), 2) if gumbel else (None, 1)
    off, rescale = how.get("off", "zero"), "scale" in how
    active = ops.sample_mask(scores, 7, samples)
    forward, backward = torch.ops.fastmask.learned_linear, torch.ops.fastmask.learned_linear_grad
    tensors = [t.detach() for t in (x, w, scores, bias)]
    rest = (options["method"], samples, 0.1, options.get("density"), off, rescale, "auto")
    opcheck(forward, (*tensors, groups if gumbel else None, seed, *rest))
    for wanted in ([True] * 4, [False, False, True, False], [True, False, False, False]):
        given = tensors[0] if wanted[1] or wanted[2] else None
        rest = (options["method"], 1.0, off, rescale, wanted, "auto")
        opcheck(
            backward, (dy, given, *tensors[1:3], active, groups if gumbel else None, seed, *rest)
        )


@pytest.mark.parametrize("options", [{"samples": 2}, *METHODS[1:]], ids=str)
def test_compiled_whole_without_recompiling(options: dict[str, Any]) -> None:
    tensors = leaves()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in (1, 2, 3):
        results = []
        for function in (call, compiled):
            torch.manual_seed(seed)
            y = function(*tensors, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_functional_gradients_and_no_second_ones() -> None:
    x, w, scores, _ = leaves()
    got = torch.func.grad(lambda s: call(x, w, s, seed=1).square().sum())(scores.detach())
    y = call(x, w, scores, seed=1).square().sum()
    (want,) = torch.autograd.grad(y, scores, create_graph=True)
    assert_same_bits(got, want)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        want.sum().backward()


def test_inference_mode_and_tied_weights() -> None:
    x, w, scores, bias = leaves(45, 45)
    with torch.inference_mode():
        assert_same_bits(call(x, w, scores, bias, seed=1), call(x, w, scores, bias, seed=1))
    y = call(call(x, w, scores, seed=1), w, scores, seed=2)
    (ds,) = torch.autograd.grad(y.sum(), scores)
    one, two = (ops.unpack(ops.sample_mask(scores, s), w.shape)[0] for s in (1, 2))
    torch.testing.assert_close(y, F.linear(F.linear(x, w * one), w * two))
    assert ds.isfinite().all()


def test_what_it_refuses() -> None:
    x, w, scores, bias = (t.detach() for t in leaves())

    def refuse(kind: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.learned_linear(*(args or (x, w, scores)), **options)

    refuse(ValueError, r"scores: expected shape \(37, 45\) \(that of weight\)", x, w, scores[:-1])
    refuse(ValueError, r"scores: expected shape \(37, 45\)", x, w, scores.T)
    refuse(TypeError, "scores: expected dtype float32", x, w, scores.long())
    refuse(
        ValueError,
        r"scores: expected a tensor on (cpu|cuda:0) like weight",
        x,
        w,
        scores.to("meta"),
    )
    refuse(TypeError, "scores: expected a torch.Tensor, got list", x, w, scores.tolist())
    refuse(ValueError, r"x: expected shape \(\.\.\., 45\)", x[:, :-1], w, scores)
    refuse(ValueError, r"weight: expected shape \(N, K\)", x, w[0], scores)
    refuse(TypeError, "weight: expected dtype torch.float32 like x", x, w.double(), scores)
    refuse(TypeError, "x: expected dtype float32", x.to(torch.complex64), w, scores)
    refuse(ValueError, r"bias: expected shape \(37,\)", bias=bias[:-1])
    refuse(ValueError, "method: expected one of 'gumbel', 'threshold', 'topk'", method="top-k")
    refuse(ValueError, "samples: expected at least 1, got 0", samples=0)
    refuse(TypeError, "samples: expected a whole number", samples=2.0)
    refuse(ValueError, "samples: expected a number of masks that divides the 6 rows", samples=4)
    refuse(ValueError, r"seed: expected a whole number in \[0, 2\*\*64\), got -1", seed=-1)
    for tau in (0.0, -1.0, NAN, INF):
        refuse(ValueError, "tau: expected a finite number above 0", tau=tau)
    for tau in (1e-31, 1e31, 5e-324):
        refuse(ValueError, r"tau: expected a temperature in \[1e-30, 1e\+30\]", tau=tau)
    for mu in (NAN, INF):
        refuse(ValueError, "mu: expected a finite number", method="threshold", mu=mu)
    for method, option in (
        ("threshold", {"seed": 1}), ("topk", {"samples": 2}), ("threshold", {"tau": 0.5}),
        ("gumbel", {"mu": 0.5}), ("topk", {"mu": 0.5}), ("gumbel", {"density": 0.5}),
        ("threshold", {"density": 0.5}),
    ):  # fmt: skip
        extra = {"density": 0.5} if method == "topk" else {}
        name = next(iter(option))
        refuse(ValueError, f"{name}: an option of method=", method=method, **option, **extra)
    refuse(ValueError, "density: method='topk' needs the share", method="topk")
    refuse(ValueError, r"density: expected a share in \[0, 1\]", method="topk", density=1.5)
    refuse(ValueError, "off: expected one of 'zero', 'flip', got 'sign'", off="sign")
    refuse(ValueError, "scale: expected one of None, 'rsqrt_density'", scale="rsqrt")
    refuse(ValueError, "scale: expected None with off='flip'", off="flip", scale="rsqrt_density")
    refuse(TypeError, "groups: expected dtype torch.int64", samples=2, groups=torch.zeros(6))
    if torch.get_default_device().type == "cpu":  # reading them would stall a GPU
        refuse(ValueError, r"groups: expected mask indices in \[0, 2\)", samples=2,
               groups=torch.tensor([0, 1, 2, 0, 0, 0]))  # fmt: skip
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", backend=unusable())
    refuse(ValueError, "backend: expected one of", backend="gpu")
