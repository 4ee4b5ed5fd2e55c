"""verify_frozen: by name and by parameter, what it tells, and what it will not compare."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastmask import BitMask
from fastmask.errors import FrozenEntriesMoved
from fastmask.optim import verify_frozen
from fastmask.testing import mask, values


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        net[0].weight.copy_(values(3, 5))
    return net


def test_every_way_to_name_the_tensors() -> None:
    net = model()
    ones = torch.tensor([[False] * 5, [True] * 5, [True] * 5])
    weight = net[0].weight
    by_name = {"0.weight": BitMask.from_bool(ones)}
    by_param = {weight: BitMask.from_bool(ones)}
    before = copy.deepcopy(net.state_dict())
    snapshot = {weight: weight.detach().clone()}
    other = copy.deepcopy(net)

    def check() -> None:
        verify_frozen(before, net, by_name)
        verify_frozen(before, net, by_param)
        verify_frozen(before, net.state_dict(), by_name)
        verify_frozen(snapshot, {weight: weight}, by_param)
        verify_frozen(snapshot, net, by_name)
        verify_frozen(other, net, by_param)
        verify_frozen(net, before, by_param)

    with torch.no_grad():
        weight[0] += 1
    check()
    with torch.no_grad():
        weight[1, 3] += 1
        weight[2, 0] += 1
    with pytest.raises(
        FrozenEntriesMoved, match=r"0.weight: 2 of 10 frozen entries, the first at \(1, 3\)"
    ):
        verify_frozen(before, net, by_name)
    for reference, current, frozen in (
        (before, net, by_param),
        (before, net.state_dict(), by_name),
        (snapshot, {weight: weight}, by_param),
        (snapshot, net, by_name),
        (other, net, by_param),
    ):
        with pytest.raises(FrozenEntriesMoved):
            verify_frozen(reference, current, frozen)


def test_it_names_every_tensor_and_counts_nan_and_signed_zero() -> None:
    before = {"a": torch.tensor([float("nan"), 0.0, 1.0]), "b": torch.tensor([1.0]).double()}
    frozen = {"a": BitMask.ones((3,)), "b": BitMask.ones((1,))}
    verify_frozen(before, copy.deepcopy(before), frozen)
    after = {"a": torch.tensor([float("nan"), -0.0, 1.0]), "b": torch.tensor([2.0]).double()}
    with pytest.raises(
        FrozenEntriesMoved,
        match=r"a: 1 of 3 frozen entries, the first at \(1,\), 0.0 then, -0.0 now; "
        r"b: 1 of 1 .* \(0,\), 1.0 then, 2.0 now",
    ):
        verify_frozen(before, after, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    old, ones = values(37, 45, dtype=dtype), mask(37, 45)
    new = old.T.contiguous().T.clone()
    verify_frozen({"w": old}, {"w": new}, {"w": BitMask.from_bool(ones)})
    new[~ones] += 1
    verify_frozen({"w": old}, {"w": new}, {"w": BitMask.from_bool(ones)})
    place = ones.nonzero()[-1]
    new[place[0], place[1]] += 1
    with pytest.raises(
        FrozenEntriesMoved, match=rf"1 of {int(ones.sum())} .* \({place[0]}, {place[1]}\)"
    ):
        verify_frozen({"w": old}, {"w": new}, {"w": BitMask.from_bool(ones)})


def test_a_scalar_and_an_empty_tensor() -> None:
    frozen = {"s": BitMask.ones(()), "e": BitMask.ones((0, 3))}
    before = {"s": torch.tensor(1.0), "e": torch.zeros(0, 3)}
    verify_frozen(before, copy.deepcopy(before), frozen)
    with pytest.raises(FrozenEntriesMoved, match=r"s: 1 of 1 frozen entries, the first at \(\)"):
        verify_frozen(before, {**before, "s": torch.tensor(2.0), "e": torch.zeros(0, 3)}, frozen)


def test_what_it_refuses() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    frozen = {"0.weight": BitMask.ones((3, 5))}

    def refuse(kind: type[Exception], match: str, *args: object) -> None:
        with pytest.raises(kind, match=match):
            verify_frozen(*args)  # type: ignore[arg-type]

    refuse(ValueError, "0.weight is the same memory as in current", net.state_dict(), net, frozen)
    refuse(ValueError, "current: expected a tensor for 0.weight", before, {}, frozen)
    refuse(ValueError, "reference: expected a tensor for parameter of shape", before, before,
           {net[0].weight: frozen["0.weight"]})  # fmt: skip
    refuse(ValueError, r"reference: expected shape \(5, 3\), that of the mask", before, net,
           {"0.weight": BitMask.ones((5, 3))})  # fmt: skip
    half = {"0.weight": before["0.weight"].half()}
    refuse(TypeError, "current: expected torch.float32 like reference", before, half, frozen)
    refuse(TypeError, "frozen: expected a mapping", before, net, [BitMask.ones((3, 5))])
    refuse(TypeError, "frozen: expected BitMasks as values, got Tensor", before, net,
           {"0.weight": torch.ones(3, 5)})  # fmt: skip
    refuse(TypeError, "current: expected a module or a mapping, got list", before, [], frozen)
