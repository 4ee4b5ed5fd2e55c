"""masked_conv2d: by hand, against float64, its gradients, and what it must survive."""

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
from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAST = torch.channels_last
# Name: shape of x, shape of the weight, options.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one": ((6, 1, 1, 1), (1, 1, 1, 1), {}),
    "1x1": ((6, 37, 5, 3), (45, 37, 1, 1), {}),
    "1x1 stride": ((6, 5, 7, 9), (3, 5, 1, 1), {"stride": 2}),
    "3x3": ((6, 3, 13, 11), (7, 3, 3, 3), {"padding": 1}),
    "stem": ((6, 3, 15, 17), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    "pairs": (
        (6, 4, 13, 11),
        (5, 4, 3, 2),
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
    ),
    "groups": ((6, 6, 9, 8), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((6, 5, 9, 7), (5, 1, 3, 3), {"groups": 5, "stride": 2, "padding": 1}),
    "multiplier": ((6, 3, 5, 5), (9, 1, 3, 3), {"groups": 3, "dilation": 2}),
    "same": ((6, 3, 9, 7), (5, 3, 3, 3), {"padding": "same", "dilation": 2}),
    "same uneven": ((6, 4, 9, 7), (6, 2, 4, 2), {"padding": "same", "groups": 2}),
    "valid": ((6, 3, 9, 7), (5, 3, 3, 5), {"padding": "valid"}),
}
every = pytest.mark.parametrize("case", CASES)


def stacked(masks: Tensor) -> Tensor:
    return torch.stack([ops.pack(one) for one in masks])


def operands(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves x, weight, bias, and the options."""
    x, w, options = CASES[case]
    made = [values(*x, dtype=dtype), values(*w, seed=1, dtype=dtype), values(w[0], dtype=dtype)]
    return [t.requires_grad_() for t in made], options


def plain(leaves: list[Tensor], m: Tensor, dy: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    x, w, b = leaves
    y = F.conv2d(x, torch.where(m, w, 0), b, **options)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def test_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    w = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    active = ops.pack(torch.tensor([[[[True, False], [False, True]]]]))
    assert ops.masked_conv2d(x, w, active, torch.tensor([0.5])).tolist() == [[[[5001.5, 6002.5]]]]
    assert ops.masked_conv2d(x[0], w, active).tolist() == [[[5001.0, 6002.0]]]


def test_samples_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    active = stacked(torch.tensor([True, False]).view(2, 1, 1, 1, 1))
    y = ops.masked_conv2d(x, torch.full((1, 1, 1, 1), 10.0), active)
    assert y.flatten().tolist() == [10.0, 20.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_forward_and_gradients_within_budget(case: str, dtype: torch.dtype) -> None:
    leaves, options = operands(case, dtype)
    m = mask(*leaves[1].shape)
    with poisoned_memory():
        y = ops.masked_conv2d(leaves[0], leaves[1], ops.pack(m), leaves[2], **options)
        dy = values(*y.shape, seed=2, dtype=dtype)
        grads = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = plain(leaves, m, dy, **options), plain(exact, m, dy, **options)
    for got, reference, truth in zip((y, *grads), *results, strict=True):
        assert_within_budget(got.detach(), reference, truth)
    assert not grads[1][~m].any(), "a masked-out weight takes no gradient"


@every
def test_many_masks_equal_one_at_a_time(case: str) -> None:
    (x, w, b), options = operands(case, torch.float64)
    masks = mask(3, *w.shape)
    y = ops.masked_conv2d(x, w, stacked(masks), b, **options)
    parts = [
        F.conv2d(part, torch.where(m, w, 0), b, **options)
        for part, m in zip(x.split(2), masks, strict=True)
    ]
    want = torch.cat(parts)
    dy = values(*y.shape, seed=3, dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(want, (x, w, b), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["pairs", "groups", "depthwise", "same uneven"])
def test_gradcheck_in_float64(case: str) -> None:
    (x, w, b), options = operands(case, torch.float64)
    x = x.detach()[:2, ..., :6, :6].requires_grad_()
    active = stacked(mask(2, *w.shape))
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.masked_conv2d(x, w, active, b, **options), (x, w, b), fast_mode=True
    )


def test_gradients_of_many_masks_are_summed_in_float32() -> None:
    # 257 is 256 in bfloat16, and 3 * 257 is 772: what each mask contributes must not be rounded first.
    x = torch.ones(3 * 257, 1, 1, 1).bfloat16()
    w = torch.ones(1, 1, 1, 1).bfloat16().requires_grad_()
    active = ops.pack(torch.ones(1, 1, 1, 1, dtype=torch.bool)).expand(3, -1)
    ops.masked_conv2d(x, w, active).sum().backward()
    assert w.grad is not None
    assert w.grad.item() == 772


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["3x3", "groups", "depthwise"])
def test_a_masked_out_weight_contributes_nothing(case: str, bad: float) -> None:
    (x, w, b), options = operands(case)
    m = mask(*w.shape)
    spoilt = torch.where(m, w.detach(), bad).requires_grad_()
    clean = torch.where(m, w.detach(), 0.0).requires_grad_()
    for one, other in zip(
        *(
            (y, *torch.autograd.grad(y.square().sum(), (x, weight, b)))
            for weight in (spoilt, clean)
            for y in [ops.masked_conv2d(x, weight, ops.pack(m), b, **options)]
        ),
        strict=True,
    ):
        assert_same_bits(one, other)
        assert one.isfinite().all()


@every
def test_all_ones_is_conv2d_and_all_zeros_is_the_bias(case: str) -> None:
    (x, w, b), options = operands(case)
    y = F.conv2d(x, w, b, **options)
    ones, zeros = torch.ones_like(w) > 0, torch.zeros_like(w) > 0
    assert_same_bits(ops.masked_conv2d(x, w, ops.pack(ones), b, **options), y)
    bias_alone = b[:, None, None].expand_as(y)
    assert torch.equal(ops.masked_conv2d(x, w, ops.pack(zeros), b, **options), bias_alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_last, w_last", [(True, False), (False, True), (True, True)])
@every
def test_channels_last(case: str, x_last: bool, w_last: bool, dtype: torch.dtype) -> None:
    (x, w, b), options = operands(case, dtype)
    m = mask(*w.shape)
    if x_last:
        x = x.detach().to(memory_format=LAST).requires_grad_()
    if w_last:
        w = w.detach().to(memory_format=LAST).requires_grad_()
    selected = torch.empty_like(w).copy_(torch.where(m, w, 0)).detach()
    want = F.conv2d(x, selected, b, **options)
    y = ops.masked_conv2d(x, w, ops.pack(m), b, **options)
    assert_same_bits(y, want)
    assert y.stride() == want.stride()
    two = ops.masked_conv2d(x, w, ops.pack(m).expand(2, -1), b, **options)
    assert two.is_contiguous(memory_format=LAST) == want.is_contiguous(memory_format=LAST)
    dy = values(*y.shape, seed=2, dtype=dtype).to(memory_format=LAST)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    results = plain([x, w, b], m, dy, **options), plain(exact, m, dy, **options)
    for got, reference, truth in zip(
        torch.autograd.grad(y, (x, w, b), dy), *(r[1:] for r in results), strict=True
    ):
        assert_within_budget(got, reference, truth)


@every
def test_one_image_empty_batches_and_strides(case: str) -> None:
    (x, w, b), options = operands(case)
    active = ops.pack(mask(*w.shape))
    y = ops.masked_conv2d(x, w, active, b, **options)
    want = F.conv2d(x[0], torch.where(mask(*w.shape), w, 0), b, **options)
    assert_same_bits(ops.masked_conv2d(x[0], w, active, b, **options), want)
    strange = [non_contiguous(t.detach()) for t in (x, w, b)]
    exact = F.conv2d(x.double(), torch.where(mask(*w.shape), w.double(), 0), b.double(), **options)
    got = ops.masked_conv2d(strange[0], strange[1], active, strange[2], **options)
    assert_within_budget(got, y.detach(), exact.detach())
    for samples in (1, 2):
        empty = x.detach()[:0].requires_grad_()
        y = ops.masked_conv2d(empty, w, active.expand(samples, -1), b, **options)
        dx, dw, db = torch.autograd.grad(y.sum(), (empty, w, b))
        assert y.shape == F.conv2d(empty, w, b, **options).shape
        assert dx.shape == empty.shape
        assert dw.shape == w.shape
        assert not dw.any()
        assert not db.any()


def test_no_bias_and_only_the_gradients_asked_for() -> None:
    (x, w, b), options = operands("groups")
    active = ops.pack(mask(*w.shape))
    y = ops.masked_conv2d(x, w, active, **options)
    assert_same_bits(y, ops.masked_conv2d(x, w, active, torch.zeros(4), **options))
    want = torch.autograd.grad(
        ops.masked_conv2d(x, w, active, b, **options).square().sum(), (x, w, b)
    )
    for chosen in range(3):
        leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate((x, w, b))]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            y = ops.masked_conv2d(leaves[0], leaves[1], active, leaves[2], **options)
        assert (x.data_ptr() in saved) == (chosen == 1), "the input is kept for the weight alone"
        (got,) = torch.autograd.grad(y.square().sum(), leaves[chosen])
        assert_same_bits(got, want[chosen])


def test_autocast_as_conv2d_does() -> None:
    (x, w, b), options = operands("same uneven")
    active = ops.pack(torch.ones_like(w) > 0)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y, want = ops.masked_conv2d(x, w, active, b, **options), F.conv2d(x, w, b, **options)
        exact = ops.masked_conv2d(x.double(), w.double(), active, b.double(), **options)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, want)
    assert exact.dtype == torch.float64
    dy = values(*y.shape).bfloat16()
    for got, expected in zip(
        torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(want, (x, w, b), dy), strict=True
    ):
        assert got.dtype == torch.float32
        assert_same_bits(got, expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_opcheck(samples: int, last: bool) -> None:
    memory_format = LAST if last else torch.contiguous_format
    x, w = values(6, 4, 9, 7).to(memory_format=memory_format), values(6, 2, 3, 2)
    active, rest = stacked(mask(samples, 6, 2, 3, 2)), ([2, 1], [1, 0], [1, 2], 2, "auto")
    op = torch.ops.fastmask
    y = op.masked_conv2d(x, w, active, values(6), *rest)
    assert y.is_contiguous(memory_format=memory_format)
    for bias in (None, values(6)):
        opcheck(op.masked_conv2d, (x, w, active, bias, *rest))
    dy = values(*y.shape).to(memory_format=memory_format)
    opcheck(op.masked_conv2d_grad_input, (dy, w, active, x.shape, *rest))
    opcheck(op.masked_conv2d_grad_weight, (dy, x, active, w.shape, *rest))


@pytest.mark.parametrize("case", ["stem", "depthwise", "same uneven"])
def test_compiled_forward_and_backward_switch_masks_without_recompiling(case: str) -> None:
    (x, w, b), options = operands(case)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.masked_conv2d, fullgraph=True, backend=counter)
    for seed in range(3):
        active = ops.pack(mask(*w.shape, seed=seed))
        results = []
        for function in (ops.masked_conv2d, compiled):
            y = function(x, w, active, b, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_compiled_for_any_batch() -> None:
    (x, w, b), options = operands("groups")
    active = ops.pack(mask(*w.shape))
    compiled = torch.compile(ops.masked_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (6, 4, 5):
        part = x.detach()[:batch].requires_grad_()
        y, want = (f(part, w, active, b, **options) for f in (compiled, ops.masked_conv2d))
        assert_same_bits(y, want)
        (dx,), (dx_want,) = (torch.autograd.grad(t.square().sum(), part) for t in (y, want))
        assert_same_bits(dx, dx_want)


def test_functional_gradients_and_no_second_ones() -> None:
    (x, w, _), options = operands("3x3")
    active = ops.pack(mask(*w.shape))
    got = torch.func.grad(
        lambda w: ops.masked_conv2d(x.detach(), w, active, **options).square().sum()
    )(w.detach())
    y = ops.masked_conv2d(x, w, active, **options).square().sum()
    (want,) = torch.autograd.grad(y, w, create_graph=True)
    assert_same_bits(got, want)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        want.sum().backward()


def test_what_it_refuses() -> None:
    x, w, b = (t.detach() for t in operands("groups")[0])
    active = ops.pack(mask(*w.shape))
    five = active.expand(5, -1)

    def refuse(kind: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.masked_conv2d(*(args or (x, w, active)), **{"groups": 2, **options})

    refuse(ValueError, r"x: expected shape \(B, 6, H, W\) or \(6, H, W\)", x[:, :5], w, active)
    refuse(ValueError, r"x: expected shape \(B, 3, H, W\)", groups=1)
    refuse(ValueError, r"x: expected shape", x[0, 0], w, active)
    refuse(ValueError, r"weight: expected shape \(N, C / groups, R, T\)", x, w[0], active)
    refuse(ValueError, r"weight: expected .* none of them 0", x, w[:0], active)
    refuse(ValueError, "groups: expected a number that divides the 4 output", groups=3)
    refuse(ValueError, "groups: expected at least 1, got 0", groups=0)
    refuse(TypeError, "groups: expected a whole number", groups=2.0)
    refuse(ValueError, r"active: expected shape \(16,\) or \(S, 16\)", x, w, active[:-8])
    refuse(TypeError, "active: expected packed bits", x, w, mask(*w.shape))
    refuse(ValueError, "number of masks that divides the 6 images of x, got 5", x, w, five)
    refuse(ValueError, "divides the 1 images of x, got 5", x[0], w, five)
    refuse(ValueError, "expected a number of masks", x, w, five[:0])
    refuse(TypeError, "weight: expected dtype torch.float32 like x", x, w.double(), active)
    refuse(TypeError, "x: expected dtype float32", x.long(), w, active)
    refuse(ValueError, r"bias: expected shape \(4,\)", bias=b[:-1])
    refuse(TypeError, "bias: expected dtype torch.float32", bias=b.double())
    refuse(
        ValueError, r"weight: expected a tensor on (cpu|cuda:0)", x, w.to("meta"), active.to("meta")
    )
    for name in ("stride", "dilation"):
        refuse(ValueError, f"{name}: expected at least 1, got 0", **{name: 0})
        refuse(TypeError, f"{name}: expected a whole number or a pair", **{name: (1, 2, 3)})
        refuse(TypeError, f"{name}: expected a whole number or a pair", **{name: 1.0})
    refuse(ValueError, r"padding: expected at least 0, got \(0, -1\)", padding=(0, -1))
    refuse(ValueError, "padding: expected one of 'same', 'valid'", padding="full")
    refuse(ValueError, r"padding: 'same' needs stride 1, got \(2, 2\)", padding="same", stride=2)
    refuse(ValueError, r"in which the kernel fits, \(11, 11\) with its dilation", dilation=5)
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", backend=unusable())
