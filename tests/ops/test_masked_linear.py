"""masked_linear: by hand, against float64, its gradients, and what it must survive."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from promises import assert_as_promised, unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def stacked(masks: Tensor) -> Tensor:
    return torch.stack([ops.pack(one) for one in masks])


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    w = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    active = ops.pack(torch.tensor([[True, False, True], [False, True, False]]))
    bias = torch.tensor([0.5, -0.5])
    assert ops.masked_linear(x, w, active, bias).tolist() == [[301.5, 39.5]]
    assert ops.masked_linear(x[0], w, active).tolist() == [301.0, 40.0]


def test_groups_and_samples_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    w = torch.tensor([[10.0]])
    active = stacked(torch.tensor([[[True]], [[False]]]))
    assert ops.masked_linear(x, w, active).flatten().tolist() == [10.0, 20.0, 0.0, 0.0]
    groups = torch.tensor([1, 0, 1, 0])
    assert ops.masked_linear(x, w, active, groups=groups).flatten().tolist() == [
        0.0,
        20.0,
        0.0,
        40.0,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADVERSARIAL_SHAPES)
def test_forward_and_gradients_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    x, w, b = values(6, k, dtype=dtype), values(n, k, seed=1, dtype=dtype), values(n, dtype=dtype)
    m, dy = mask(n, k), values(6, n, seed=2, dtype=dtype)

    def plain(kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(kind).requires_grad_() for t in (x, w, b)]
        y = F.linear(leaves[0], torch.where(m, leaves[1], 0), leaves[2])
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with poisoned_memory():
        y = ops.masked_linear(leaves[0], leaves[1], ops.pack(m), leaves[2])
        grads = torch.autograd.grad(y, leaves, dy)
    for got, reference, exact in zip((y, *grads), plain(dtype), plain(torch.float64), strict=True):
        assert_within_budget(got.detach(), reference, exact)
    assert not grads[1][~m].any(), "a masked-out weight takes no gradient"


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_long_sums_are_within_budget(rows: int) -> None:
    """Sums over 4096 inputs and, back, over 4096 outputs: a single running sum errs too much."""
    for n, k in ((64, 4096), (4096, 64)):
        x, w, dy = values(rows, k), values(n, k, seed=1), values(rows, n, seed=2)
        m = mask(n, k)
        selected = torch.where(m, w, 0)
        leaf = x.clone().requires_grad_()
        y = ops.masked_linear(leaf, w, ops.pack(m))
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert_within_budget(y.detach(), x @ selected.T, x.double() @ selected.double().T)
        assert_within_budget(dx, dy @ selected, dy.double() @ selected.double())


@pytest.mark.parametrize("by_groups", [False, True])
def test_many_masks_equal_one_at_a_time(by_groups: bool) -> None:
    s, b, n, k = 3, 12, 37, 45
    x = values(b, k, dtype=torch.float64).requires_grad_()
    w = values(n, k, seed=1, dtype=torch.float64).requires_grad_()
    masks = mask(s, n, k)
    groups = torch.randint(s, (b,)) if by_groups else None
    owner = groups if groups is not None else torch.arange(b) // (b // s)
    y = ops.masked_linear(x, w, stacked(masks), groups=groups)
    want = torch.stack([x[i] @ torch.where(masks[owner[i]], w, 0).T for i in range(b)])
    dy = values(b, n, seed=3, dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(want, (x, w), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_in_float64() -> None:
    x, w, b = (values(*s, dtype=torch.float64).requires_grad_() for s in ((4, 5), (3, 5), (3,)))
    active = stacked(mask(2, 3, 5))
    assert torch.autograd.gradcheck(
        lambda *args: ops.masked_linear(args[0], args[1], active, args[2]), (x, w, b)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_masked_out_weight_contributes_nothing(bad: float) -> None:
    w, m = values(5, 70), mask(5, 70)
    spoilt = torch.where(m, w, bad).requires_grad_()
    x = values(3, 70).requires_grad_()
    y = ops.masked_linear(x, spoilt, ops.pack(m))
    assert_same_bits(y, ops.masked_linear(x, torch.where(m, w, 0.0), ops.pack(m)))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_all_ones_is_linear_and_all_zeros_is_the_bias() -> None:
    x, w, b = values(4, 45), values(37, 45), values(37)
    ones, zeros = torch.ones(37, 45, dtype=torch.bool), torch.zeros(37, 45, dtype=torch.bool)
    exact = F.linear(x.double(), w.double(), b.double())
    assert_as_promised(ops.masked_linear(x, w, ops.pack(ones), b), F.linear(x, w, b), exact)
    assert_same_bits(ops.masked_linear(x, w, ops.pack(zeros), b), b.expand(4, -1).contiguous())


def test_shapes_strides_and_empty_batches() -> None:
    w, m = values(37, 45), mask(37, 45)
    active = ops.pack(m)
    x = values(2, 3, 45)
    y = ops.masked_linear(x, w, active)
    assert y.shape == (2, 3, 37)
    assert_same_bits(ops.masked_linear(non_contiguous(x), non_contiguous(w), active), y)
    assert_same_bits(ops.masked_linear(x, w.T.contiguous().T, active), y)
    assert ops.masked_linear(x[:0], w, active).shape == (0, 3, 37)
    empty = torch.zeros(0, 45, requires_grad=True)
    ops.masked_linear(empty, w, active).sum().backward()
    assert empty.grad is not None
    groups = torch.zeros(2, 3, dtype=torch.int64)
    assert_same_bits(ops.masked_linear(x, w, active, groups=groups), y)


def test_autocast_as_linear_does() -> None:
    x, w, b = values(4, 45), values(37, 45), values(37)
    active = ops.pack(torch.ones(37, 45, dtype=torch.bool))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y, plain = ops.masked_linear(x, w, active, b), F.linear(x, w, b)
        exact = ops.masked_linear(x.double(), w.double(), active, b.double())
    assert y.dtype == torch.bfloat16
    assert_as_promised(y, plain, exact)
    assert exact.dtype == torch.float64


def test_opcheck() -> None:
    x, w, m = values(6, 45), values(37, 45), mask(2, 37, 45)
    active, groups = stacked(m), torch.tensor([0, 1, 0, 1, 1, 1])
    for g in (None, groups):
        opcheck(torch.ops.fastmask.masked_linear, (x, w, active, values(37), g, "auto"))
        dy = values(6, 37)
        opcheck(torch.ops.fastmask.masked_linear_grad_input, (dy, w, active, g, "auto"))
        opcheck(torch.ops.fastmask.masked_linear_grad_weight, (dy, x, active, g, "auto"))


def test_compiled_forward_and_backward_switch_masks_without_recompiling() -> None:
    x, w, b = (t.requires_grad_() for t in (values(6, 45), values(37, 45), values(37)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.masked_linear, fullgraph=True, backend=counter)
    for seed in range(3):
        active = ops.pack(mask(37, 45, seed=seed))
        results = []
        for function in (ops.masked_linear, compiled):
            y = function(x, w, active, b)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_functional_gradients() -> None:
    x, w, active = values(4, 45), values(37, 45), ops.pack(mask(37, 45))
    got = torch.func.grad(lambda weight: ops.masked_linear(x, weight, active).square().sum())(w)
    leaf = w.clone().requires_grad_()
    ops.masked_linear(x, leaf, active).square().sum().backward()
    assert leaf.grad is not None
    assert_same_bits(got, leaf.grad)


def test_double_backward_is_refused_rather_than_wrong() -> None:
    x, w = values(2, 3).requires_grad_(), values(4, 3).requires_grad_()
    y = ops.masked_linear(x, w, ops.pack(mask(4, 3))).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_what_it_refuses() -> None:
    x, w, active = values(6, 45), values(37, 45), ops.pack(mask(37, 45))
    two = stacked(mask(2, 37, 45))
    five = stacked(mask(5, 37, 45))

    def refuse(kind: type[Exception], match: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=match):
            ops.masked_linear(*args, **options)  # type: ignore[arg-type]

    refuse(ValueError, r"x: expected shape \(\.\.\., 45\)", values(6, 44), w, active)
    refuse(ValueError, r"weight: expected shape \(N, K\)", x, w[0], active)
    refuse(ValueError, r"active: expected shape \(216,\) or \(S, 216\)", x, w, active[:-8])
    refuse(TypeError, "active: expected packed bits", x, w, mask(37, 45))
    refuse(ValueError, "active: expected a number of masks that divides the 6 rows", x, w, five)
    refuse(TypeError, "weight: expected dtype torch.float32 like x", x, w.double(), active)
    refuse(ValueError, r"bias: expected shape \(37,\)", x, w, active, values(36))
    refuse(TypeError, "bias: expected dtype torch.float32", x, w, active, values(37).double())
    refuse(
        ValueError,
        r"weight: expected a tensor on (cpu|cuda:0) like x",
        x,
        w.to("meta"),
        active.to("meta"),
    )
    refuse(TypeError, "x: expected dtype", x.long(), w, active)
    refuse(TypeError, "groups: expected dtype torch.int64", x, w, two, groups=torch.zeros(6))
    refuse(ValueError, r"groups: expected shape \(6,\)", x, w, two, groups=torch.zeros(5).long())
    if x.device.type == "cpu":  # reading them would stall a GPU
        refuse(ValueError, r"groups: expected mask indices in \[0, 2\), got 0 to 2", x, w, two,
               groups=torch.tensor([0, 1, 2, 0, 0, 0]))  # fmt: skip
    refuse(
        BackendUnavailable,
        f"back end '{unusable()}' cannot be used",
        x,
        w,
        active,
        backend=unusable(),
    )
