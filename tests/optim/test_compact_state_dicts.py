"""State dicts of compact optimizers: into the same, under other masks, into dense ones and torch's."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from masked_runs import (
    PAIRS,
    assert_same_as_dense,
    assert_same_run,
    entries,
    moments,
    parameters,
    run,
)
from torch import nn

from fastmask import BitMask
from fastmask.optim import compact
from fastmask.testing import assert_same_bits, mask, values

both = pytest.mark.parametrize(
    "masked, plain, options", PAIRS, ids=[cls.__name__ for cls, _, _ in PAIRS]
)
BITS = BitMask.from_bool(mask(64, 64, density=0.9))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 512 entries, so that small parameters have many, and a last one that is short."""
    monkeypatch.setattr(compact, "CHUNK", 512)


def reload(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file and back, as torch allows without running any code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
def test_resuming_equals_an_uninterrupted_run(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    whole, saved = parameters(), parameters()
    uninterrupted = masked(whole, **options, frozen={whole[0]: BITS}, compact=True)
    run(uninterrupted, 20)
    before = masked(saved, **options, frozen={saved[0]: BITS}, compact=True)
    run(before, 9)
    checkpoint = reload({"params": [p.data for p in saved], "optimizer": before.state_dict()})
    assert checkpoint["optimizer"]["param_groups"] == before.state_dict()["param_groups"]
    resumed = [nn.Parameter(p) for p in checkpoint["params"]]
    after = masked(resumed, **options, frozen={resumed[0]: BITS}, compact=True)
    after.load_state_dict(checkpoint["optimizer"])
    run(after, 11, start=9)
    assert_same_run(after, uninterrupted)
    assert not any("frozen" in state for state in after.state.values())


@both
def test_a_compact_state_loads_under_other_masks_and_into_a_dense_optimizer(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    other = BitMask.from_bool(mask(64, 64, density=0.5, seed=1))
    for bits, smaller in itertools.product((other, BITS, None), (True, False)):
        params = parameters()
        optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
        run(optimizer, 9)
        state = reload(optimizer.state_dict())
        kept = copy.deepcopy(state)
        loaded_params = [nn.Parameter(p.detach().clone()) for p in params]
        now = None if bits is None else {loaded_params[0]: bits}
        loaded = masked(loaded_params, **options, frozen=now, compact=smaller)
        loaded.load_state_dict(state)
        for key, value in kept["state"][0].items():
            assert torch.equal(state["state"][0][key], value), "the caller's own is untouched"
        optimizer.set_frozen(None if bits is None else {params[0]: bits})
        for one in (loaded, optimizer):
            run(one, 5, start=9)
        if smaller:
            assert_same_run(loaded, optimizer)
        else:
            assert_same_as_dense(optimizer, loaded)


@both
@pytest.mark.usefixtures("torchs_bits")
def test_torchs_state_is_made_compact_and_becomes_torchs_again(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    theirs = parameters()
    torchs = plain(theirs, **options)
    run(torchs, 10)
    state = copy.deepcopy(torchs.state_dict())
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    ours = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    ours.load_state_dict(state)
    free = ~BITS.to_bool()
    for mine, other in zip(moments(ours, params[0]), moments(torchs, theirs[0]), strict=True):
        assert_same_bits(mine, other[free])
    for one in (ours, torchs):
        run(one, 10, start=10)
    assert_same_bits(params[0], theirs[0], where=free)
    dense = masked([nn.Parameter(p.detach().clone()) for p in params], **options)
    dense.load_state_dict(ours.state_dict())
    again = plain([nn.Parameter(p.detach().clone()) for p in params], **options)
    again.load_state_dict(dense.state_dict())
    for mine, other in zip(
        moments(again, entries(again)[0]), moments(torchs, theirs[0]), strict=True
    ):
        assert_same_bits(mine, other.masked_fill(~free, 0))
    assert dense.state_dict()["state"].keys() == state["state"].keys()
    assert dense.state_dict()["state"][0].keys() == state["state"][0].keys()


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}])
@both
def test_torchs_own_stops_at_compact_state(
    masked: Any, plain: Any, options: dict[str, Any], form: dict[str, bool]
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    run(optimizer, 1)
    theirs = plain(params, **{**options, **form})
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
        theirs.step()


@both
def test_a_state_dict_that_does_not_fit_is_refused(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    run(optimizer, 3)
    key = optimizer._moments[0]

    def refuse(match: str, into: Any, change: Any = lambda held: None) -> None:
        state = copy.deepcopy(optimizer.state_dict())
        change(state["state"][0])
        before = copy.deepcopy(into.state_dict()["state"])
        with pytest.raises(ValueError, match=match):
            into.load_state_dict(state)
        assert into.state_dict()["state"].keys() == before.keys()

    free = 4096 - BITS.count()
    refuse(rf"expected {key} of shape \({free},\) for parameter 0 of group 0, got \({free - 1},\)",
           optimizer, lambda held: held.update({key: held[key][1:]}))  # fmt: skip
    refuse(rf"state_dict: expected {key} of shape \(64, 64\) for parameter 0 of group 0, got",
           optimizer, lambda held: held.pop("frozen"))  # fmt: skip
    refuse("state_dict: its mask of parameter 0 of group 0 does not fit: bits: expected",
           optimizer, lambda held: held.update(frozen=held["frozen"][8:]))  # fmt: skip
    turned = [nn.Parameter(values(64, 65)), nn.Parameter(values(33, 7))]
    refuse("its mask of parameter 0 of group 0 does not fit", masked(turned, **options))
    refuse(
        "different number of parameter groups|doesn't match the size", masked(params[:1], **options)
    )


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
@both
def test_copies_and_pickles_go_their_own_way(
    masked: Any, plain: Any, options: dict[str, Any], duplicate: Any
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS}, compact=True)
    run(optimizer, 5)
    other_params, other = duplicate((params, optimizer))
    start = params[0].detach().clone()
    run(other, 5, start=5)
    assert_same_bits(params[0], start)
    run(optimizer, 5, start=5)
    assert_same_run(other, optimizer)
    other.set_frozen(None)
    assert moments(other, other_params[0])[0].shape == (64, 64)
    assert moments(optimizer, params[0])[0].shape == (4096 - BITS.count(),)
