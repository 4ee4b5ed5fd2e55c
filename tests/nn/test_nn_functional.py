"""Masked layers under torch.func: mapped, differentiated and called with other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import fastmask
from fastmask import (
    BitMask,
    FixedMask,
    GumbelMask,
    MaskedConv2d,
    MaskedLinear,
    ThresholdMask,
    TopKMask,
)
from fastmask.masks import Mask
from fastmask.nn import set_batch_norm_policy
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

pytestmark = pytest.mark.filterwarnings("error:.*performance drop.*")

LINEAR, CONV = (5, 7), (4, 3, 2, 2)
MASKS: dict[str, Callable[[tuple[int, ...]], Mask]] = {
    "gumbel": lambda _: GumbelMask(init=0.0),
    "threshold": lambda _: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda _: TopKMask(0.5, "flip"),
    "fixed": lambda shape: FixedMask(BitMask.from_bool(mask(*shape))),
}
every = pytest.mark.parametrize("kind", MASKS)
layers = pytest.mark.parametrize("layer", ["linear", "conv"])


def made(layer: str, kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A layer, and three batches for it."""
    torch.manual_seed(seed)
    if layer == "linear":
        return MaskedLinear(7, 5, mask=MASKS[kind](LINEAR)), values(3, 4, 7, seed=seed)
    return MaskedConv2d(3, 4, 2, mask=MASKS[kind](CONV)), values(3, 4, 3, 5, 5, seed=seed)


def seeded(run: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(4)
    return run(*args)


def assert_same(actual: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
    for key, tensor in actual.items():
        assert_same_bits(tensor, torch.stack([one[key] for one in expected]))


@every
@layers
@pytest.mark.parametrize("mode", [True, False])
def test_mapped_over_inputs_it_does_what_it_does_to_each(layer: str, kind: str, mode: bool) -> None:
    model, x = made(layer, kind)
    model.train(mode)
    random = mode and kind == "gumbel"
    out = seeded(vmap(model, randomness="same" if random else "error"), x)
    assert_same_bits(out, torch.stack([seeded(model, part) for part in x]))


@layers
def test_vmap_rules_the_noise(layer: str) -> None:
    model, x = made(layer, "gumbel")
    x = x[:1].expand_as(x)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(model)(x)
    one, two, three = seeded(vmap(model, randomness="different"), x)
    assert not torch.equal(one, two) and not torch.equal(two, three)
    assert_same_bits(*seeded(vmap(model, randomness="same"), x)[:2])


@every
@layers
def test_mapped_over_stacked_layers(layer: str, kind: str) -> None:
    models = [made(layer, kind, seed)[0] for seed in range(3)]
    if kind == "fixed":
        for seed, model in enumerate(models):
            bits = mask(*model.weight.shape, seed=seed)
            model.mask.bits.copy_(BitMask.from_bool(bits).bits)
    x = made(layer, kind)[1][0]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    for mode in (True, False):
        if mode and kind == "gumbel":
            continue  # Seeds of slices are drawn together: no single layer draws the same.
        base.train(mode)
        out = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
        assert_same_bits(out, torch.stack([model.train(mode)(x) for model in models]))


def loss(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, state, (x,)).square().sum()


@every
@layers
def test_gradients_of_each_sample(layer: str, kind: str) -> None:
    model, x = made(layer, kind)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_one = grad(lambda state, part: loss(model, state, part))
    mapped = vmap(of_one, in_dims=(None, 0), randomness="same")
    expected = []
    for part in x:
        model.zero_grad()
        seeded(model, part).square().sum().backward()
        expected.append({name: p.grad.clone() for name, p in learned.items()})
        single = seeded(of_one, learned, part)
        assert_same({name: g.unsqueeze(0) for name, g in single.items()}, expected[-1:])
    assert_same(seeded(mapped, learned, x), expected)


@every
def test_jacobians_go_backward_and_forward_mode_is_refused(kind: str) -> None:
    model, x = made("linear", kind)
    model.eval()
    jacobian = jacrev(model)(x[0, 0])
    # The map is linear: its Jacobian is the weight it reads, in column order of the unit vectors.
    product = model(torch.eye(7)) - model(torch.zeros(1, 7))
    # w + b is rounded, then its difference from b: half an ulp each, of |w| + |b| at most.
    budget = torch.finfo(torch.float32).eps * (product.abs().max() + model.bias.abs().max())
    assert (jacobian.T - product).abs().max() <= budget
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(model, (x[0],), (x[0],))


def test_a_converted_network_is_mapped_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    fastmask.mask_(model, GumbelMask(init=0.5))
    set_batch_norm_policy(model, "affine")
    x = values(6, 1, 3, 4, 4)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_one = grad(lambda state, part: loss(model, state, part))
    found = seeded(vmap(of_one, in_dims=(None, 0), randomness="same"), learned, x)
    assert set(found) == set(learned) and "0.mask.logits" in learned
    singles = [seeded(of_one, learned, part) for part in x]
    model.double()
    wide = {name: p.detach().double() for name, p in learned.items()}
    exact = [seeded(of_one, wide, part) for part in x.double()]
    for key, mapped in found.items():
        # What torch maps by itself (norms) sums in another order.
        want, truth = (torch.stack([one[key] for one in each]) for each in (singles, exact))
        assert_within_budget(mapped, want, truth)
