"""masked_adamw_: by hand, against torch's own steps as integers, and what it must survive."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from promises import unusable
from torch import Tensor
from torch.optim.adamw import adamw

from fastmask import _backend, ops
from fastmask.errors import BackendUnavailable
from fastmask.ops.masked_adamw_ import reference
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
    {"amsgrad": largest, "weight_decay": wd, "maximize": up, "lr": lr}
    for largest, wd, up, lr in itertools.product(
        (False, True), (0.0, 0.1), (False, True), (0.01, torch.tensor(0.01))
    )
]
BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def name(options: dict[str, Any]) -> str:
    given = {**options, "lr": isinstance(options["lr"], Tensor)}
    return "-".join(f"{key}{value:g}" for key, value in given.items() if value) or "plain"


def promises_torchs_bits(dtype: torch.dtype) -> bool:
    """Whether what `auto` takes here does."""
    module = _backend.resolve("masked_adamw_", "auto", torch.get_default_device(), dtype)
    return module is reference


class State:
    """A parameter and all that AdamW keeps of it."""

    def __init__(self, start: Tensor, amsgrad: bool = False) -> None:
        self.param = start.clone()
        self.moments = [torch.zeros_like(start) for _ in range(3 if amsgrad else 2)]
        self.step = torch.tensor(0.0)

    def lists(self, grad: Tensor) -> tuple[Any, ...]:
        m, v, *largest = ([t] for t in self.moments)
        return [self.param], [grad], m, v, largest[0] if largest else None, [self.step]

    def torch_step(self, grad: Tensor, **options: Any) -> None:
        """One step of torch's own functional AdamW, for-loop, in place."""
        *first, largest, steps = self.lists(grad)
        # On a GPU the count stays there unread, and so does torch's on its capturable path.
        options.setdefault("capturable", self.step.is_cuda)
        adamw(*first, largest or [], steps, foreach=False, fused=False, **BETAS, **options)

    def masked_step(self, grad: Tensor, frozen: list[Tensor] | None, **options: Any) -> None:
        options = {key: value for key, value in options.items() if key != "amsgrad"}
        ops.masked_adamw_(*self.lists(grad), frozen, **BETAS, **options)


def test_by_hand() -> None:
    state = State(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    state.moments = [torch.tensor([0.0, 0.0, 1.0, 5.0]), torch.tensor([0.0, 0.0, 3.0, 5.0])]
    state.step = torch.tensor(1.0)
    grad = torch.tensor([4.0, 4.0, 1.0, float("nan")])
    frozen = ops.pack(torch.tensor([False, True, False, True]))
    ops.masked_adamw_(*state.lists(grad), [frozen], lr=0.5, beta1=0.5, beta2=0.5, eps=0.0,
                      weight_decay=1.0)  # fmt: skip
    # t = 2: m = (2, 1), v = (8, 2), divided by 3/4: theta = 0.5 - 0.5 * (8/3) / sqrt(32/3) and so on.
    want = [0.5 - 0.5 * (8 / 3) / (32 / 3) ** 0.5, 1, 0.5 - 0.5 * (4 / 3) / (8 / 3) ** 0.5, 1]
    torch.testing.assert_close(state.param, torch.tensor(want))
    assert state.moments[0].tolist() == [2.0, 0.0, 1.0, 5.0]
    assert state.moments[1].tolist() == [8.0, 0.0, 2.0, 5.0]
    assert state.step == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_frozen_entries_keep_their_bits_and_free_ones_torchs(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Adding frozen entries changes no other entry; on the reference all bits are torch's."""
    for number, shape in enumerate(ADVERSARIAL_SHAPES):
        m = mask(*shape, seed=number)
        start = values(*shape, dtype=dtype)
        theirs, none_frozen, ours = (State(start, options["amsgrad"]) for _ in range(3))
        for step in range(4):
            grad = values(*shape, seed=step + 1, dtype=dtype)
            theirs.torch_step(grad, **options)
            with poisoned_memory():
                none_frozen.masked_step(grad, None, **options)
                ours.masked_step(grad, [ops.pack(m)], **options)
        assert_same_bits(ours.param, start, where=m)
        assert_same_bits(ours.param, none_frozen.param, where=~m)
        for masked, mine in zip(ours.moments, none_frozen.moments, strict=True):
            assert_same_bits(masked, torch.where(m, 0, mine))
        if promises_torchs_bits(dtype):
            assert_same_bits(none_frozen.param, theirs.param)
            for mine, other in zip(none_frozen.moments, theirs.moments, strict=True):
                assert_same_bits(mine, other)
        assert ours.step == theirs.step == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_a_step_is_within_the_budget_of_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    for number, shape in enumerate(((1, 7), (37, 45), (10, 1280))):
        given = [values(*shape, seed=5 * number + i, dtype=dtype) for i in range(5)]
        states = []
        for kind in (dtype, dtype, torch.float64):
            state = State(given[0].to(kind), options["amsgrad"])
            state.moments = [given[1].to(kind), given[2].to(kind).square(), given[3].to(kind).abs()]
            state.moments = state.moments[: 3 if options["amsgrad"] else 2]
            state.step += 2 + number
            states.append(state)
        ours, theirs, exact = states
        # Squared in dtype, so that all begin alike.
        exact.moments[1] = ours.moments[1].double().clone()
        ours.masked_step(given[4], None, **options)
        theirs.torch_step(given[4], **options)
        exact.torch_step(given[4].double(), **options)
        for got, plain, want in zip(
            (ours.param, *ours.moments), (theirs.param, *theirs.moments),
            (exact.param, *exact.moments), strict=True,
        ):  # fmt: skip
            assert_within_budget(got, plain, want)


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_a_count_on_the_device_gives_torchs_capturable_bits(rate: float | Tensor) -> None:
    """Here on the CPU, where torch takes that path only while it is compiled."""
    grad = values(37, 45, seed=1)
    theirs, ours = State(values(37, 45)), State(values(37, 45))
    for _ in range(3):
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            theirs.torch_step(grad, lr=rate, weight_decay=0.1, amsgrad=False, maximize=False,
                              capturable=True)  # fmt: skip
        with mock.patch.object(reference, "advance_by_number", reference.advance_by_tensor):
            ours.masked_step(grad, None, lr=rate, weight_decay=0.1, backend="reference")
    assert_same_bits(ours.param, theirs.param)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_the_step() -> None:
    states = [State(values(37, 45).cuda()) for _ in range(2)]
    grad, frozen = values(37, 45, seed=1).cuda(), [ops.pack(mask(37, 45).cuda())]
    for state in states:
        state.step = state.step.cuda()
        state.masked_step(grad, frozen, lr=0.01, weight_decay=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states[1].masked_step(grad, frozen, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        states[0].masked_step(grad, frozen, lr=0.01, weight_decay=0.1)
        graph.replay()
    assert_same_bits(states[1].param, states[0].param)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.0])
def test_frozen_entries_keep_their_bits_whatever_is_there(bad: float) -> None:
    m = mask(37, 45)
    start = torch.where(m, bad, values(37, 45))
    state = State(start, amsgrad=True)
    stale = [torch.where(m, float("nan"), t) for t in state.moments]
    state.moments = [t.clone() for t in stale]
    grad = torch.where(m, float("nan"), values(37, 45, seed=1))
    for _ in range(5):
        state.masked_step(grad, [ops.pack(m)], lr=0.1, weight_decay=0.1)
    assert_same_bits(state.param, start, where=m)
    for moment, before in zip(state.moments, stale, strict=True):
        assert_same_bits(moment, before, where=m)
    assert state.param[~m].isfinite().all()
    assert (state.param != start)[~m].all()


def test_many_tensors_in_a_call_are_each_their_own() -> None:
    shapes = [(37, 45), (0, 3), (1,), (), (2, 3, 4)]
    starts = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [values(*shape, seed=i + 9) for i, shape in enumerate(shapes)]
    bits = [ops.pack(mask(*shape, seed=i)) for i, shape in enumerate(shapes)]
    together, apart = [State(s) for s in starts], [State(s) for s in starts]
    for i, state in enumerate(together):
        state.step += i  # each counts for itself
        apart[i].step += i
    ops.masked_adamw_(
        [s.param for s in together],
        grads,
        [s.moments[0] for s in together],
        [s.moments[1] for s in together],
        None,
        [s.step for s in together],
        [*bits[:4], None],
        lr=0.1,
    )
    for i, (state, one) in enumerate(zip(together, apart, strict=True)):
        one.masked_step(grads[i], [bits[i]] if i < 4 else None, lr=0.1, weight_decay=1e-2)
        assert_same_bits(state.param, one.param)
        assert state.step == one.step == i + 1
    ops.masked_adamw_([], [], [], [], None, [], None, lr=0.1)


def test_strides_are_followed() -> None:
    m, start, grad = mask(37, 45), values(37, 45), values(37, 45, seed=1)
    for make in (non_contiguous, lambda t: t.T.contiguous().T):
        ours, theirs = State(start, amsgrad=True), State(start, amsgrad=True)
        ours.param, ours.moments = make(ours.param), [make(t) for t in ours.moments]
        options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": False}
        ours.masked_step(make(grad), [ops.pack(m)], **options)
        theirs.masked_step(grad, [ops.pack(m)], **options)
        assert_same_bits(ours.param.contiguous(), theirs.param)
        assert_same_bits(ours.param.contiguous(), start, where=m)


def test_autograd_notices_the_write_and_parameters_may_require_grad() -> None:
    state = State(values(3, 4))
    state.param.requires_grad_()
    y = state.param.square().sum()
    state.masked_step(torch.ones(3, 4), None, lr=0.1)
    assert state.param.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_moments_give_the_bits_of_dense_ones(dtype: torch.dtype) -> None:
    """In one call with dense ones, over more elements than a piece of the engine."""
    shapes, many = [(37, 45), (3,), (2, 65536 + 37), (64,), (5, 13)], range(5)
    ones = [
        mask(*s, density=d, seed=i)
        for i, (s, d) in enumerate(zip(shapes, (0.5, 0.9, 0.9, 1, 0.5), strict=True))
    ]
    ones[1][:2] = torch.tensor([True, False])
    results = []
    for compact in (False, True):
        params = [values(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
        state = [
            [values(*s, seed=i + k, dtype=dtype).abs() for i, s in enumerate(shapes)]
            for k in (50, 60, 70)
        ]
        if compact:
            state = [[one[i][~ones[i]] if i < 4 else one[i] for i in many] for one in state]
        steps = [torch.tensor(float(i)) for i in many]
        for step in range(2):
            grads = [torch.where(one, float("nan"), values(*p.shape, seed=step + 9, dtype=dtype))
                     for p, one in zip(params, ones, strict=True)]  # fmt: skip
            ops.masked_adamw_(params, grads, *state, steps, [ops.pack(one) for one in ones], lr=0.1)
        assert [float(t) for t in steps] == [2.0, 3.0, 4.0, 5.0, 6.0]
        results.append((params, state))
    for i, one in enumerate(ones):
        assert_same_bits(results[1][0][i], results[0][0][i])
        assert_same_bits(results[1][0][i], values(*one.shape, seed=i, dtype=dtype), where=one)
        for dense, other in zip(results[0][1], results[1][1], strict=True):
            assert_same_bits(other[i], dense[i][~one] if i < 4 else dense[i])


def test_counts_of_steps_in_any_dtype_and_of_one_memory() -> None:
    """float64 counts are not the engine's own; all are advanced, and autograd notices."""
    for kind in (torch.float32, torch.float64):
        params, steps = (
            [values(37, 45, seed=i) for i in range(2)],
            [torch.tensor(3.0, dtype=kind)] * 2,
        )
        noticed = steps[0]._version
        state = [[torch.zeros(37, 45) for _ in range(2)] for _ in range(2)]
        ops.masked_adamw_(params, [p.clone() for p in params], *state, None, steps, None, lr=0.1)
        assert steps[0] == 5
        assert steps[0]._version > noticed


def test_opcheck() -> None:
    states = [State(values(37, 45), amsgrad=True), State(values(131), amsgrad=True)]
    params, grads = [s.param for s in states], [values(37, 45, seed=1), values(131, seed=1)]
    m, v, largest = ([s.moments[i] for s in states] for i in range(3))
    steps, rate = [s.step for s in states], torch.tensor(0.1, dtype=torch.float64)
    numbers = (0.9, 0.999, 1e-8, 0.01, False, "auto")
    for frozen, most in (([ops.pack(mask(37, 45)), None], largest), ([None, None], [])):
        args = (params, grads, m, v, most, steps, frozen, rate, *numbers)
        opcheck(torch.ops.fastmask.masked_adamw_, args)


def test_compiled_in_full_and_new_masks_and_counts_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: Tensor, frozen: Tensor,
             rate: Tensor) -> None:  # fmt: skip
        ops.masked_adamw_([param], [grad], [m], [v], None, [t], [frozen], lr=rate)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    states = [State(values(37, 45)) for _ in range(2)]
    for seed in range(3):
        frozen, grad = ops.pack(mask(37, 45, seed=seed)), values(37, 45, seed=seed)
        for function, s in zip((step, compiled), states, strict=True):
            function(s.param, grad, *s.moments, s.step, frozen, torch.tensor(0.1 / (seed + 1)))
        assert_same_bits(states[1].param, states[0].param)
        assert states[1].step == states[0].step == seed + 1
    assert counter.frame_count == 1


def test_what_it_refuses() -> None:
    p, g, bits = values(37, 45), values(37, 45), ops.pack(mask(37, 45))
    good: dict[str, Any] = {
        "params": [p], "grads": [g], "exp_avgs": [g.clone()], "exp_avg_sqs": [g.abs()],
        "max_exp_avg_sqs": None, "steps": [torch.tensor(0.0)], "frozen": [bits], "lr": 0.1,
    }  # fmt: skip
    start = p.clone()

    def refuse(kind: type[Exception], match: str, **wrong: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.masked_adamw_(**{**good, **wrong})
        assert_same_bits(p, start)

    refuse(TypeError, "params: expected a list of tensors", params=p)
    refuse(TypeError, r"params\[0\]: expected dtype .*, got torch.int64", params=[p.long()])
    refuse(ValueError, "exp_avgs: expected 1 elements", exp_avgs=[])
    refuse(ValueError, r"exp_avg_sqs\[0\]: expected shape \(37, 45\)", exp_avg_sqs=[g[:1]])
    refuse(ValueError, r"exp_avgs\[0\]: .* expanded", exp_avgs=[g[:1].expand(37, 45)])
    refuse(TypeError, r"max_exp_avg_sqs\[0\]: expected dtype", max_exp_avg_sqs=[g.half()])
    refuse(TypeError, r"grads\[0\]: expected a dense tensor", grads=[g.to_sparse()])
    refuse(ValueError, r"grads\[0\]: expected a tensor on (cpu|cuda:0)", grads=[g.to("meta")])
    refuse(TypeError, r"steps\[0\]: expected a torch.Tensor, got int", steps=[3])
    refuse(TypeError, r"steps\[0\]: expected dtype", steps=[torch.tensor(3)])
    refuse(ValueError, r"steps\[0\]: expected 1 element", steps=[torch.zeros(2)])
    refuse(ValueError, r"steps\[0\]: .* on (cpu|cuda:0)", steps=[torch.zeros((), device="meta")])
    refuse(TypeError, r"frozen\[0\]: expected packed bits", frozen=[mask(37, 45)])
    refuse(ValueError, r"frozen\[0\]: expected shape \(216,\)", frozen=[bits[:-8]])
    refuse(ValueError, "lr: expected a finite number", lr=float("inf"))
    refuse(ValueError, r"beta1: expected a number in \[0, 1\), got 1", beta1=1.0)
    refuse(ValueError, "beta2: expected a number of at least 0", beta2=-0.1)
    refuse(ValueError, "eps: expected a finite number, got nan", eps=float("nan"))
    refuse(TypeError, "weight_decay: expected a number, got NoneType", weight_decay=None)
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", backend=unusable())
