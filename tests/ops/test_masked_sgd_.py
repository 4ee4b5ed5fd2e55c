"""masked_sgd_: by hand, against torch's own steps as integers, and what it must survive."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from promises import assert_as_promised, unusable
from torch import Tensor
from torch.optim.sgd import sgd

from fastmask import _backend, ops
from fastmask.errors import BackendUnavailable
from fastmask.ops.masked_sgd_ import reference
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
OPTIONS = [
    {"momentum": mu, "dampening": damp, "weight_decay": wd, "nesterov": nesterov, "maximize": up}
    for mu, damp, wd, nesterov, up in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not nesterov or (mu and not damp)
]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}{value:g}" for key, value in options.items() if value) or "plain"


def promises_torchs_bits(dtype: torch.dtype) -> bool:
    """Whether what `auto` takes here does."""
    device = torch.get_default_device()
    module = _backend.resolve("masked_sgd_", "auto", device, dtype)
    kept = module.__name__.endswith(".cpu") and dtype == torch.float32
    return module is reference or kept


def torch_step(param: Tensor, grad: Tensor, buf: Tensor | None, **options: Any) -> Tensor | None:
    """One step of torch's own functional SGD, for-loop, in place; returns the momentum."""
    buffers = [buf]
    sgd([param], [grad], buffers, foreach=False, fused=False, **options)
    return buffers[0]


def test_by_hand() -> None:
    param = torch.tensor([1.0, 1.0, 1.0, 1.0])
    grad = torch.tensor([1.0, 1.0, 2.0, float("nan")])
    buf = torch.tensor([4.0, 4.0, 8.0, 8.0])
    frozen = ops.pack(torch.tensor([False, True, False, True]))
    ops.masked_sgd_([param], [grad], [buf], [frozen], lr=0.5, momentum=0.5, weight_decay=1.0)
    # buf = 0.5 * 4 + (1 + 1) = 4; theta = 1 - 0.5 * 4 = -1.   buf = 0.5 * 8 + (2 + 1) = 7; 1 - 3.5.
    assert buf.tolist() == [4.0, 4.0, 7.0, 8.0]
    assert param.tolist() == [-1.0, 1.0, -2.5, 1.0]


def test_the_first_step_writes_the_gradient_undamped_and_zero_where_frozen() -> None:
    param, grad = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    buf = torch.full((2,), float("nan"))
    frozen = ops.pack(torch.tensor([False, True]))
    ops.masked_sgd_(
        [param], [grad], [buf], [frozen], lr=0.25, momentum=0.9, dampening=0.5, first=True
    )
    assert buf.tolist() == [2.0, 0.0]
    assert param.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_frozen_entries_keep_their_bits_and_free_ones_torchs(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Adding frozen entries changes no other entry; where it is promised all bits are torch's."""
    for number, shape in enumerate(ADVERSARIAL_SHAPES):
        m = mask(*shape, seed=number)
        start = values(*shape, dtype=dtype)
        theirs, none_frozen, ours = start.clone(), start.clone(), start.clone()
        buf: Tensor | None = None
        bufs = [torch.empty_like(start) for _ in range(2)]
        for step in range(4):
            grad = values(*shape, seed=step + 1, dtype=dtype)
            buf = torch_step(theirs, grad, buf, lr=0.1, **options)
            with poisoned_memory():
                for param, momentum, frozen in (
                    (none_frozen, bufs[0], None),
                    (ours, bufs[1], [ops.pack(m)]),
                ):
                    ops.masked_sgd_(
                        [param], [grad], [momentum], frozen, lr=0.1, first=step == 0, **options
                    )
        if promises_torchs_bits(dtype):
            assert_same_bits(none_frozen, theirs)
            if buf is not None:
                assert_same_bits(bufs[0], buf)
        assert_same_bits(ours, start, where=m)
        assert_same_bits(ours, none_frozen, where=~m)
        if buf is not None:
            assert_same_bits(bufs[1], torch.where(m, 0, bufs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_a_step_is_within_the_budget_of_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    for number, shape in enumerate(((1, 7), (37, 45), (10, 1280))):
        param, grad, buf = (values(*shape, seed=3 * number + i, dtype=dtype) for i in range(3))
        theirs, exact = [param.clone(), buf.clone()], [param.double(), buf.double()]
        torch_step(theirs[0], grad, theirs[1], lr=0.1, **options)
        torch_step(exact[0], grad.double(), exact[1], lr=0.1, **options)
        ops.masked_sgd_([param], [grad], [buf], None, lr=0.1, **options)
        for got, plain, want in zip((param, buf), theirs, exact, strict=True):
            assert_within_budget(got, plain, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.0])
def test_frozen_entries_keep_their_bits_whatever_is_there(bad: float) -> None:
    m = mask(37, 45)
    start = torch.where(m, bad, values(37, 45))
    stale = torch.where(m, float("nan"), values(37, 45, seed=2))
    param, buf = start.clone(), stale.clone()
    grad = torch.where(m, float("nan"), values(37, 45, seed=1))
    for _ in range(5):
        ops.masked_sgd_(
            [param], [grad], [buf], [ops.pack(m)], lr=0.1, momentum=0.9, weight_decay=0.1
        )
    assert_same_bits(param, start, where=m)
    assert_same_bits(buf, stale, where=m)
    assert param[~m].isfinite().all()
    assert (param != start)[~m].all()


def test_many_tensors_in_a_call_are_each_their_own() -> None:
    shapes = [(37, 45), (0, 3), (1,), (), (2, 3, 4)]
    params = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [values(*shape, seed=i + 9) for i, shape in enumerate(shapes)]
    masks: list[Tensor | None] = [mask(*shape, seed=i) for i, shape in enumerate(shapes)]
    masks[4] = None
    apart = [p.clone() for p in params]
    bits = [None if m is None else ops.pack(m) for m in masks]
    ops.masked_sgd_(params, grads, None, bits, lr=0.1)
    for param, grad, m, together in zip(apart, grads, masks, params, strict=True):
        start = param.clone()
        ops.masked_sgd_([param], [grad], None, [None if m is None else ops.pack(m)], lr=0.1)
        assert_same_bits(together, param)
        moved, exact = start.sub(grad, alpha=0.1), start.double().sub(grad.double(), alpha=0.1)
        free = torch.ones_like(start, dtype=torch.bool) if m is None else ~m
        assert_as_promised(param, moved, exact, where=free)
        assert_same_bits(param, start, where=~free)
    ops.masked_sgd_([], [], None, None, lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
def test_compact_momenta_give_the_bits_of_dense_ones(first: bool, dtype: torch.dtype) -> None:
    """In one call with dense ones, over more elements than a piece of the engine, whole words free or not."""
    shapes = [(37, 45), (3,), (2, 65536 + 37), (64,), (5, 13), (300, 7)]
    ones = [
        mask(*s, density=d, seed=i)
        for i, (s, d) in enumerate(zip(shapes, (0.5, 0.4, 0.9) * 2, strict=True))
    ]
    ones[2][0, 640:1280], ones[2][1, :640], ones[3][:], ones[5][:] = True, False, True, False
    ones[5][299] = True
    results = []
    for compact in (False, True):
        params = [values(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
        momenta = [values(*s, seed=i + 50, dtype=dtype) for i, s in enumerate(shapes)]
        if compact:
            momenta[:4] = [buf[~one] for buf, one in zip(momenta[:4], ones[:4], strict=True)]
        for step in range(2):
            grads = [torch.where(one, float("nan"), values(*p.shape, seed=step + 9, dtype=dtype))
                     for p, one in zip(params, ones, strict=True)]  # fmt: skip
            ops.masked_sgd_(params, grads, momenta, [ops.pack(one) for one in ones], lr=0.1, momentum=0.9,
                            weight_decay=0.1, nesterov=True, first=first and step == 0)  # fmt: skip
        results.append((params, momenta))
    for i, one in enumerate(ones):
        assert_same_bits(results[1][0][i], results[0][0][i])
        assert_same_bits(results[1][0][i], values(*one.shape, seed=i, dtype=dtype), where=one)
        dense, other = results[0][1][i], results[1][1][i]
        assert_same_bits(other, dense[~one] if i < 4 else dense)


def test_compact_momenta_that_are_not_the_free_entries_are_refused() -> None:
    start, bits = values(2, 70000), ops.pack(mask(2, 70000))
    free = 140000 - int(ops.popcount(bits))
    for wrong in (free - 1, free + 1, 0):
        param, buf = start.clone(), values(wrong)
        with pytest.raises(
            ValueError, match=rf"params\[0\]: expected its {free} free .*, got {wrong}"
        ):
            ops.masked_sgd_([param], [start], [buf], [bits], lr=0.1, momentum=0.9)
        assert_same_bits(param, start)
        assert_same_bits(buf, values(wrong))
    with pytest.raises(ValueError, match=r"momenta\[0\]: expected shape \(2, 70000\)"):
        ops.masked_sgd_([start], [start], [start[0]], None, lr=0.1, momentum=0.9)


def test_a_gradient_that_is_negated_lazily() -> None:
    """Of a single number too: its memory is then contiguous and holds the negative."""
    for shape in ((), (1,), (37, 45)):
        grad = torch.complex(torch.zeros(shape), values(*shape)).conj().imag
        assert grad.is_neg()
        param = torch.zeros(shape)
        ops.masked_sgd_([param], [grad], None, None, lr=1.0)
        assert_same_bits(param, values(*shape))


def test_strides_are_followed() -> None:
    m, start, grad = mask(37, 45), values(37, 45), values(37, 45, seed=1)
    want, exact = start.sub(grad, alpha=0.1), start.double().sub(grad.double(), alpha=0.1)
    for make in (non_contiguous, lambda t: t.T.contiguous().T):
        param, buf = make(start), make(torch.zeros_like(start))
        ops.masked_sgd_(
            [param], [make(grad)], [buf], [ops.pack(m)], lr=0.1, momentum=0.9, first=True
        )
        assert_as_promised(param, want, exact, where=~m)
        assert_same_bits(param, start, where=m)
        assert_same_bits(buf.contiguous(), torch.where(m, 0, grad))


def test_a_tensor_as_learning_rate() -> None:
    grad = values(37, 45, seed=1)
    for rate in (torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        param, theirs, exact = values(37, 45), values(37, 45), values(37, 45).double()
        ops.masked_sgd_([param], [grad], None, None, lr=rate)
        options = dict.fromkeys(("momentum", "dampening", "weight_decay"), 0.0)
        for other, given in ((theirs, grad), (exact, grad.double())):
            torch_step(other, given, None, lr=rate, nesterov=False, maximize=False, **options)
        assert_as_promised(param, theirs, exact)


def test_autograd_notices_the_write_and_parameters_may_require_grad() -> None:
    param = values(3, 4).requires_grad_()
    y = param.square().sum()
    ops.masked_sgd_([param], [torch.ones(3, 4)], None, None, lr=0.1)
    assert param.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck() -> None:
    params, grads = [values(37, 45), values(131)], [values(37, 45, seed=1), values(131, seed=1)]
    momenta = [torch.zeros_like(p) for p in params]
    rate = torch.tensor(0.1, dtype=torch.float64)
    for frozen in ([ops.pack(mask(37, 45)), None], [None, None]):
        numbers = (0.9, 0.1, 0.0, False, False, False, "auto")
        opcheck(torch.ops.fastmask.masked_sgd_, (params, grads, momenta, frozen, rate, *numbers))
        numbers = (0.0, 0.1, 0.0, False, True, False, "auto")
        opcheck(torch.ops.fastmask.masked_sgd_, (params, grads, [], frozen, rate, *numbers))


def test_compiled_in_full_and_new_masks_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(param: Tensor, grad: Tensor, buf: Tensor, frozen: Tensor, rate: Tensor) -> None:
        ops.masked_sgd_([param, param + 0], [grad] * 2, [buf, buf + 0], [frozen, None], lr=rate,
                        momentum=0.9, weight_decay=0.1, nesterov=True)  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    states = [[values(37, 45), torch.zeros(37, 45)] for _ in range(2)]
    for seed in range(3):
        frozen, grad = ops.pack(mask(37, 45, seed=seed)), values(37, 45, seed=seed)
        rate = torch.tensor(0.1 / (seed + 1))
        for function, (param, buf) in zip((step, compiled), states, strict=True):
            function(param, grad, buf, frozen, rate)
        for eager, other in zip(*states, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_what_it_refuses() -> None:
    p, g, bits = values(37, 45), values(37, 45), ops.pack(mask(37, 45))
    start = p.clone()

    def refuse(kind: type[Exception], match: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=match):
            ops.masked_sgd_(*args, **{"lr": 0.1, **options})  # type: ignore[arg-type]
        assert_same_bits(p, start)

    refuse(TypeError, "params: expected a list of tensors, got Tensor", p, [g], None, None)
    refuse(TypeError, r"params\[0\]: expected dtype .*, got torch.complex64", [p.cfloat()], [g],
           None, None)  # fmt: skip
    refuse(TypeError, r"params\[1\]: expected dtype torch.float32 like params\[0\]", [p, p.double()],
           [g, g], None, None)  # fmt: skip
    refuse(ValueError, r"params\[0\]: expected a tensor that can be written, got one expanded",
           [p[:1].expand(37, 45)], [g], None, None)  # fmt: skip
    refuse(ValueError, "grads: expected 1 elements, one for each of params, got 0", [p], [], None,
           None)  # fmt: skip
    refuse(TypeError, r"grads\[0\]: expected a dense tensor, got torch.sparse_coo", [p],
           [g.to_sparse()], None, None)  # fmt: skip
    refuse(TypeError, r"grads\[0\]: expected a torch.Tensor, got NoneType", [p], [None], None, None)
    refuse(ValueError, r"grads\[0\]: expected shape \(37, 45\)", [p], [g.T], None, None)
    refuse(TypeError, r"grads\[0\]: expected dtype torch.float32", [p], [g.half()], None, None)
    refuse(
        ValueError,
        r"grads\[0\]: expected a tensor on (cpu|cuda:0)",
        [p],
        [g.to("meta")],
        None,
        None,
    )
    refuse(ValueError, "momenta: expected 1 elements", [p], [g], None, None, momentum=0.9)
    refuse(ValueError, r"momenta\[0\]: expected shape", [p], [g], [g[:1]], None, momentum=0.9)
    refuse(ValueError, "frozen: expected 1 elements", [p], [g], None, [])
    refuse(TypeError, r"frozen\[0\]: expected packed bits", [p], [g], None, [mask(37, 45)])
    refuse(ValueError, r"frozen\[0\]: expected shape \(216,\)", [p], [g], None, [bits[:-8]])
    refuse(ValueError, r"frozen\[0\]: expected shape \(216,\) \(one mask", [p], [g], None,
           [bits.unsqueeze(0)])  # fmt: skip
    refuse(
        ValueError,
        r"frozen\[0\]: expected a tensor on (cpu|cuda:0)",
        [p],
        [g],
        None,
        [bits.to("meta")],
    )
    refuse(ValueError, "lr: expected a finite number, got nan", [p], [g], None, None,
           lr=float("nan"))  # fmt: skip
    refuse(ValueError, "lr: expected a number or a floating tensor of 1 element", [p], [g], None,
           None, lr=torch.ones(2))  # fmt: skip
    refuse(TypeError, "momentum: expected a number, got str", [p], [g], None, None, momentum="0.9")
    refuse(ValueError, "nesterov: expected momentum > 0", [p], [g], None, None, nesterov=True)
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", [p], [g], None, None,
           backend=unusable())  # fmt: skip
