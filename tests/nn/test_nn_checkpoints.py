"""Checkpoints of masked networks: strict in both directions, whole masks or none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastmask import (
    BitMask,
    FixedMask,
    GumbelMask,
    MaskedLinear,
    ThresholdMask,
    TopKMask,
    plain_state_dict,
)
from fastmask.masks import Mask
from fastmask.testing import assert_same_bits, mask, values

MASKS: dict[str, Callable[[], Mask]] = {
    "gumbel": GumbelMask,
    "threshold": ThresholdMask,
    "topk": lambda: TopKMask(0.5),
    "fixed": lambda: FixedMask(BitMask.from_bool(mask(37, 45))),
}
every = pytest.mark.parametrize("kind", MASKS)


class Gated(nn.Module):
    """A user's module that calls something of its own `mask`."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x).sigmoid()


def network(first: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(first=first, norm=nn.BatchNorm1d(37), last=nn.Linear(37, 5), gate=Gated())
    )


def masked(kind: str) -> nn.Sequential:
    return network(MaskedLinear(45, 37, mask=MASKS[kind]()))


def scramble(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(values(*p.shape, seed=p.numel()))
    return module


@every
def test_a_plain_checkpoint_loads_strictly_and_leaves_the_mask(kind: str) -> None:
    model, plain = masked(kind), network(nn.Linear(45, 37))
    scramble(model[0].mask)
    before = model[0].mask.active()
    result = model.load_state_dict(plain.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert model[0].mask.active() == before
    assert_same_bits(model[0].weight.detach(), plain[0].weight.detach())
    layer = MaskedLinear(45, 37, mask=MASKS[kind]())
    layer.load_state_dict(plain[0].state_dict(), strict=True)
    assert_same_bits(layer.weight.detach(), plain[0].weight.detach())


@every
def test_plain_state_dict_loads_strictly_into_the_plain_network(kind: str) -> None:
    model, plain = scramble(masked(kind)), network(nn.Linear(45, 37))
    state = plain_state_dict(model)
    assert list(state) == list(plain.state_dict()), "a user's own module called mask stays"
    plain.load_state_dict(state, strict=True)
    assert_same_bits(plain[0].weight.detach(), model[0].weight.detach())
    assert_same_bits(plain.gate.mask.weight.detach(), model.gate.mask.weight.detach())
    alone = MaskedLinear(45, 37, mask=MASKS[kind]())
    assert list(plain_state_dict(alone)) == ["weight", "bias"]
    assert "mask.weight" in plain_state_dict(Gated())
    model.load_state_dict(state, strict=True)


def test_masks_shared_by_layers_go_from_both() -> None:
    one = MaskedLinear(4, 4, mask=GumbelMask())
    two = MaskedLinear(4, 4, mask=one.mask)
    assert list(plain_state_dict(nn.Sequential(one, two))) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


@every
def test_a_whole_checkpoint_comes_back(kind: str) -> None:
    model, other = scramble(masked(kind)), masked(kind)
    if kind == "fixed":
        model[0].mask.bits.copy_(BitMask.from_bool(mask(37, 45, seed=8)).bits)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other[0].mask.active() == model[0].mask.active()
    for name, tensor in other.state_dict().items():
        assert_same_bits(tensor, model.state_dict()[name])


def test_part_of_a_mask_is_an_error() -> None:
    class Shifted(ThresholdMask):
        """A mask that keeps two tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(()))

    model = MaskedLinear(45, 37, mask=Shifted())
    state = model.state_dict()
    assert {"mask.scores", "mask.shift"} < set(state)
    del state["mask.scores"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mask.scores"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["mask.scores"]


@every
def test_a_mask_of_another_kind_is_an_error(kind: str) -> None:
    other = "fixed" if kind != "fixed" else "gumbel"
    with pytest.raises(
        RuntimeError, match=r'(?s)Missing key.*"first\.mask\.\w+".*Unexpected key.*"first\.mask'
    ):
        masked(kind).load_state_dict(masked(other).state_dict())


@every
def test_a_mask_of_another_shape_is_an_error(kind: str) -> None:
    state = masked(kind).state_dict()
    key = next(key for key in state if key.startswith("first.mask."))
    state[key] = state[key][:-8]
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        masked(kind).load_state_dict(state)


def test_a_mask_on_its_own_loads_strictly() -> None:
    alone = GumbelMask().for_weight(values(5, 7))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "logits"'):
        alone.load_state_dict({})
    alone.load_state_dict({"logits": values(5, 7)})
    assert_same_bits(alone.logits.detach(), values(5, 7))


def test_a_checkpoint_of_the_masked_network_is_strange_to_the_plain_one() -> None:
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network(nn.Linear(45, 37)).load_state_dict(masked("gumbel").state_dict())


def test_scores_load_as_float32_and_meta_layers_take_tensors() -> None:
    layer = MaskedLinear(45, 37, mask=GumbelMask())
    state = {name: t.bfloat16() for name, t in scramble(masked("gumbel"))[0].state_dict().items()}
    layer.load_state_dict(state)
    assert layer.mask.logits.dtype == torch.float32
    later = MaskedLinear(45, 37, device="meta", mask=GumbelMask())
    later.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bits(later.eval()(values(3, 45)).detach(), layer.eval()(values(3, 45)).detach())


def test_plain_state_dict_wants_a_module() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        plain_state_dict({})  # type: ignore[arg-type]
