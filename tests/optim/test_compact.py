"""compact=True: no bit of the trajectory changes, and state is there for free entries alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_runs import (
    PAIRS,
    assert_same_as_dense,
    assert_same_run,
    entries,
    moments,
    name,
    parameters,
    run,
)
from torch import Tensor, nn

from fastmask import BitMask, _backend
from fastmask.optim import MaskedAdamW, MaskedSGD, compact, protect
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    values,
)

both = pytest.mark.parametrize(
    "masked, plain, options", PAIRS, ids=[cls.__name__ for cls, _, _ in PAIRS]
)
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (MaskedSGD, {"weight_decay": 0.1}),
    (MaskedSGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    (MaskedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (MaskedAdamW, {}),
    (MaskedAdamW, {"amsgrad": True, "maximize": True}),
    (MaskedAdamW, {"betas": (0.0, 0.5), "weight_decay": 0.0, "capturable": True}),
]
BITS = BitMask.from_bool(mask(64, 64, density=0.9))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 512 entries, so that small parameters have many, and a last one that is short."""
    monkeypatch.setattr(compact, "CHUNK", 512)


def many_layouts(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of every kind of strides and size, with NaN and -0.0, and masks for them, True = frozen."""
    made = [
        values(64, 64, dtype=dtype),
        values(16, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        values(37, 45, dtype=dtype).T,
        non_contiguous(values(33, 7, dtype=dtype)),
        values(1031, dtype=dtype),
        values(1, dtype=dtype)[0],
        values(0, 3, dtype=dtype),
        *(values(40, 40, seed=i, dtype=dtype) for i in range(3)),
    ]
    ones = [mask(*value.shape, density=0.9, seed=i) for i, value in enumerate(made)]
    ones[-3][:] = True
    ones[-2][:] = False
    ones[-1][7:] = True  # whole chunks have nothing free
    with torch.no_grad():
        made[0][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    ones[0][0, :3] = True
    return made, ones


def pair(
    cls: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32, **extra: Any
) -> list[Any]:
    """A compact and a dense optimizer of the same parameters."""
    made = []
    for smaller in (True, False):
        start, ones = many_layouts(dtype)
        params = [nn.Parameter(value) for value in start]
        frozen = {p: BitMask.from_bool(bits) for p, bits in zip(params, ones, strict=True)}
        made.append(cls(params, lr=0.01, **options, **extra, frozen=frozen, compact=smaller))
    return made


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                _backend.missing("cpu") is not None, reason="torch rounds the last few otherwise"
            ),
        ),
    ],
)
@pytest.mark.parametrize(
    "cls, options", OPTIONS, ids=lambda value: name(value) if isinstance(value, dict) else ""
)
def test_every_bit_is_that_of_dense_state(
    cls: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, dense = pair(cls, options, dtype)
    start = [p.detach().clone() for p in entries(ours)]
    for optimizer in (ours, dense):
        run(optimizer, 20)
    assert_same_as_dense(ours, dense)
    for param, before in zip(entries(ours), start, strict=True):
        frozen = ours.frozen[param].to_bool()
        assert_same_bits(param, before, where=frozen)
        if dtype != torch.bfloat16:  # there an entry may come back to the very value it began with
            assert (param != before)[~frozen].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_sixteen_bits_are_as_near_as_dense_ones(
    masked: Any, plain: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """On the reference torch rounds the last few of a 16-bit CPU tensor otherwise, so places show."""
    updated = {}
    for kind, smaller in ((dtype, True), (dtype, False), (torch.float64, False)):
        weight = nn.Parameter(values(64, 64).to(dtype).to(kind))
        optimizer = masked([weight], **options, frozen={weight: BITS}, compact=smaller)
        weight.grad = values(64, 64, seed=1).to(dtype).to(kind)
        optimizer.step()
        updated[kind, smaller] = weight.detach()
    assert_same_bits(updated[dtype, True], values(64, 64).to(dtype), where=BITS.to_bool())
    assert_within_budget(updated[dtype, True], updated[dtype, False], updated[torch.float64, False])
    weight = nn.Parameter(values(64, 64).to(dtype))
    run(masked([weight], **options, frozen={weight: BITS}, compact=True), 50)
    assert_same_bits(weight, values(64, 64).to(dtype), where=BITS.to_bool())
    assert (weight != values(64, 64).to(dtype))[~BITS.to_bool()].float().mean() > 0.95


@both
def test_state_is_a_tenth_where_nine_tenths_are_frozen(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    free = 4096 - BITS.count()
    bare = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    assert not bare.state, "made at the first step"
    run(bare, 1)
    for moment in moments(bare, params[0]):
        assert moment.shape == (free,)
        assert moment.untyped_storage().nbytes() == 4 * free
    for moment in moments(bare, params[1]):
        assert moment.shape == params[1].shape, "a parameter without a mask is torch's"
    bare.set_frozen({params[0]: BitMask.ones((64, 64)), params[1]: BitMask.zeros((33, 7))})
    assert all(moment.untyped_storage().nbytes() == 0 for moment in moments(bare, params[0]))
    for moment in moments(bare, params[1]):
        assert moment.shape == params[1].shape, "so is one with nothing frozen"


@both
def test_no_more_than_a_chunk_is_copied(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        nbytes = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view:
                new = all(out is not value for value in args if isinstance(value, Tensor))
                self.nbytes = max(self.nbytes, new * out.untyped_storage().nbytes())
            return out

    weight = nn.Parameter(values(256, 64).T)
    frozen = {weight: BitMask.from_bool(mask(64, 256, density=0.9))}
    optimizer = masked([weight], **options, frozen=frozen, compact=True)
    run(optimizer, 1)
    weight.grad = values(64, 256)
    with Largest() as largest:
        optimizer.step()
    # A tenth of a chunk's 512 entries is free; unpacked bits take a byte each, indices 8.
    assert 0 < largest.nbytes <= 512 * 8


@both
def test_masks_switch_in_the_middle_as_with_dense_state(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    options = {**options, "nesterov": False, "dampening": 0.3} if masked is MaskedSGD else options
    optimizers = [masked(parameters(), **options, compact=smaller) for smaller in (True, False)]
    turns: list[BitMask | None] = [
        None,
        BITS,
        BitMask.from_bool(mask(64, 64, density=0.5, seed=1)),
        BitMask.ones((64, 64)),
        BITS,
        BitMask.zeros((64, 64)),
        BitMask.from_bool(mask(64, 64, density=0.5, seed=2)),
        None,
    ]
    for turn, bits in enumerate(turns):
        for optimizer in optimizers:
            optimizer.set_frozen(None if bits is None else {entries(optimizer)[0]: bits})
        assert_same_as_dense(*optimizers)
        for optimizer in optimizers:
            run(optimizer, 5, start=5 * turn)
        assert_same_as_dense(*optimizers)


@both
def test_masks_set_before_the_first_step_and_wholly_frozen_ones_freed_late(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    optimizers = []
    for smaller in (True, False):
        params = parameters()
        whole = {param: BitMask.ones(param.shape) for param in params}
        optimizers.append(masked(params, **options, frozen=whole, compact=smaller))
    for optimizer in optimizers:
        run(optimizer, 5)
        optimizer.set_frozen({entries(optimizer)[0]: BITS})
        run(optimizer, 5, start=5)
    assert_same_as_dense(*optimizers)


@both
def test_a_mask_that_its_owner_writes_to_later(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params, bits = parameters(), BITS.clone()
    optimizer = masked(params, **options, frozen={params[0]: bits}, compact=True)
    run(optimizer, 2)
    bits.bits.zero_()
    run(optimizer, 2)
    assert_same_bits(params[0], values(64, 64), where=BITS.to_bool())


@both
def test_protect_forgets_compact_state_at_the_entries_it_freezes(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    run(optimizer, 5)
    more = mask(64, 64, seed=3)
    start = params[0].detach().clone()
    before = [moment.clone() for moment in moments(optimizer, params[0])]
    with protect(optimizer, {params[0]: BitMask.from_bool(more)}):
        held = more[~BITS.to_bool()]
        for moment, was in zip(moments(optimizer, params[0]), before, strict=True):
            assert not moment[held].any()
            assert_same_bits(moment, was, where=~held)
        run(optimizer, 5)
    assert_same_bits(params[0], start, where=more | BITS.to_bool())
    assert (params[0] != start)[~(more | BITS.to_bool())].all()


@both
def test_a_compiled_step_is_one_graph(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    optimizers = []
    for _ in range(2):
        params = parameters()
        rate = torch.tensor(options["lr"])
        frozen = {params[0]: BITS}
        optimizers.append(masked(params, **{**options, "lr": rate}, frozen=frozen, compact=True))
    optimizers[1].step = torch.compile(optimizers[1].step, fullgraph=True, backend=counter)
    for step in range(6):
        for optimizer in optimizers:
            run(optimizer, 1, start=step)
    assert_same_run(*optimizers)
    assert counter.frame_count <= 2


@both
def test_refused_gradients_change_nothing(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    params[0].grad = values(64, 64).to_sparse()
    with pytest.raises(TypeError, match=r"expected a dense tensor, got torch.sparse_coo"):
        optimizer.step()
    assert_same_bits(params[0], values(64, 64))
    expanded = nn.Parameter(values(64, 1).expand(64, 64))
    expanded.grad = values(64, 64)
    with pytest.raises(ValueError, match="expected a tensor that can be written"):
        masked([expanded], **options, frozen={expanded: BITS}, compact=True).step()
    run(optimizer, 1)
    assert all(moment.isfinite().all() for moment in moments(optimizer, params[0]))
    hollow = nn.Parameter(torch.empty(64, 64, device="meta"))
    with pytest.raises(
        ValueError, match="can count for parameter 0 of group 0, got a mask on meta"
    ):
        masked([hollow], **options, frozen={hollow: BITS.to("meta")}, compact=True)
    params[0].data, params[0].grad = values(64, 63), values(64, 63)
    with pytest.raises(ValueError, match=r"frozen\[0\]: expected"):
        optimizer.step()
    assert_same_bits(params[0], values(64, 63))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(ADVERSARIAL_SHAPES),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 2**16),
    setup=st.sampled_from(OPTIONS),
)
def test_any_mask_gives_the_bits_of_dense_state(
    shape: tuple[int, int], density: float, seed: int, setup: tuple[Any, dict[str, Any]]
) -> None:
    cls, options = setup
    bits = BitMask.from_bool(mask(*shape, density=density, seed=seed))
    optimizers = []
    for smaller in (True, False):
        param = nn.Parameter(values(*shape, seed=seed))
        optimizers.append(cls([param], lr=0.1, **options, frozen={param: bits}, compact=smaller))
        run(optimizers[-1], 3)
    assert_same_as_dense(*optimizers)
