"""Freezing: what any mask, shape, optimizer and interruption obey, compared as integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masked_runs import assert_same_as_dense, reference_alone, run
from optimizer_setups import SETUPS
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.optim import MaskedAdamW, MaskedSGD, compact, protect
from fastmask.testing import as_integers, assert_same_bits, mask, values

# Under these an entry's update depends on other entries too; LBFGS needs a closure besides.
COUPLED = ("Adafactor", "Muon", "LBFGS")
ENTRYWISE = [setup for setup in SETUPS if not setup[0].startswith(COUPLED)]
MASKED: list[tuple[str, Any, dict[str, Any]]] = [
    ("MaskedSGD", MaskedSGD, {"weight_decay": 0.1}),
    ("MaskedSGD", MaskedSGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("MaskedSGD", MaskedSGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("MaskedAdamW", MaskedAdamW, {}),
    ("MaskedAdamW", MaskedAdamW, {"amsgrad": True, "weight_decay": 0.1}),
]
WAYS = ENTRYWISE + [
    (name, cls, {**options, "compact": smaller})
    for name, cls, options in MASKED
    for smaller in (False, True)
]
ways = st.sampled_from(WAYS)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Any:
    """Chunks of 128 entries, so that compact state has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "CHUNK", 128)
        yield


def build(
    way: tuple[str, Any, dict[str, Any]], param: nn.Parameter, frozen: Tensor
) -> torch.optim.Optimizer:
    """An optimizer that holds the frozen entries of one parameter."""
    _, cls, options = way
    bits = {param: BitMask.from_bool(frozen)}
    if cls in (MaskedSGD, MaskedAdamW):
        return cls([param], **options, frozen=bits)
    optimizer = cls([param], **options)
    protect(optimizer, bits)
    return optimizer


def trained(
    way: tuple[str, Any, dict[str, Any]], start: Tensor, frozen: Tensor, steps: int = 4
) -> Tensor:
    param = nn.Parameter(start.clone())
    run(build(way, param, frozen), steps)
    return param.detach()


@given(ways, shapes, densities, seeds, st.data())
def test_one_more_frozen_entry_changes_no_other(
    way: Any, shape: tuple[int, int], density: float, seed: int, data: st.DataObject
) -> None:
    start, frozen = values(*shape, seed=seed), mask(*shape, density=density, seed=seed)
    more = frozen.clone()
    place = data.draw(st.integers(0, more.numel() - 1))
    more.view(-1)[place] = True
    fewer, further = trained(way, start, frozen), trained(way, start, more)
    assert_same_bits(further, fewer, where=~more)
    assert_same_bits(further, start, where=more)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_the_optimizers_named_as_coupled_are(name: str) -> None:
    way = next(setup for setup in SETUPS if setup[0] == name)
    start, frozen = values(8, 8), torch.zeros(8, 8, dtype=torch.bool)
    more = frozen.clone()
    more[0, 0] = True
    fewer, further = trained(way, start, frozen), trained(way, start, more)
    assert (as_integers(further) != as_integers(fewer))[~more].any()
    assert_same_bits(further, start, where=more)


@given(ways, shapes, seeds)
def test_all_frozen_is_bit_identical_whatever_it_holds(
    way: Any, shape: tuple[int, int], seed: int
) -> None:
    start = values(*shape, seed=seed)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3e38])
    start.view(-1)[: odd.numel()] = odd[: start.numel()]
    param = nn.Parameter(start.clone())
    optimizer = build(way, param, torch.ones(shape, dtype=torch.bool))
    for gradient in (torch.full(shape, torch.nan), torch.full(shape, torch.inf), start):
        param.grad = gradient.clone()
        optimizer.step()
    assert_same_bits(param, start)


@given(ways, shapes, seeds)
def test_nothing_frozen_is_the_plain_trajectory(
    way: Any, shape: tuple[int, int], seed: int
) -> None:
    name, cls, options = way
    start = values(*shape, seed=seed)
    with reference_alone():
        held = trained(way, start, torch.zeros(shape, dtype=torch.bool))
    if name.startswith("Masked"):
        cls = {MaskedSGD: torch.optim.SGD, MaskedAdamW: torch.optim.AdamW}[cls]
        options = {key: value for key, value in options.items() if key != "compact"}
    param = nn.Parameter(start.clone())
    run(cls([param], **options), 4)
    assert_same_bits(held, param.detach())


@given(ways, shapes, densities, seeds, st.integers(0, 6))
def test_resuming_at_any_step_is_the_uninterrupted_run(
    way: Any, shape: tuple[int, int], density: float, seed: int, stop: int
) -> None:
    start, frozen = values(*shape, seed=seed), mask(*shape, density=density, seed=seed)
    first = nn.Parameter(start.clone())
    optimizer = build(way, first, frozen)
    run(optimizer, stop)
    second = nn.Parameter(first.detach().clone())
    resumed = build(way, second, frozen)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, 6 - stop, start=stop)
    assert_same_bits(second.detach(), trained(way, start, frozen, steps=6))


turns = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("freeze"), densities, seeds),
        st.tuples(st.just("reload"), st.booleans()),
    ),
    min_size=1,
    max_size=8,
)


@given(st.sampled_from(MASKED), shapes, seeds, turns)
def test_compact_and_dense_state_agree_through_masks_and_reloads(
    way: Any, shape: tuple[int, int], seed: int, story: list[tuple[Any, ...]]
) -> None:
    _, cls, options = way
    pair = [
        cls([nn.Parameter(values(*shape, seed=seed))], **options, compact=smaller)
        for smaller in (True, False)
    ]
    done = 0
    for action, *what in story:
        for i, optimizer in enumerate(pair):
            (param,) = optimizer.param_groups[0]["params"]
            before = param.detach().clone()
            if action == "step":
                run(optimizer, what[0], start=done)
            elif action == "freeze":
                density, drawn = what
                bits = BitMask.from_bool(mask(*shape, density=density, seed=drawn))
                optimizer.set_frozen({param: bits})
            else:
                # From compact state to dense or compact, then back to what this one is.
                through = cls([param], **options, frozen=optimizer.frozen, compact=what[0])
                through.load_state_dict(optimizer.state_dict())
                pair[i] = cls([param], **options, frozen=optimizer.frozen, compact=i == 0)
                pair[i].load_state_dict(through.state_dict())
            held = optimizer.frozen.get(param)
            if held is not None:
                assert_same_bits(param.detach(), before, where=held.to_bool())
        done += what[0] if action == "step" else 0
        assert_same_as_dense(*pair)
