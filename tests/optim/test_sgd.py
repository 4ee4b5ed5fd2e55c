"""MaskedSGD: torch's trajectory bit for bit with nothing frozen, and torch's habits with something."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.optim import MaskedSGD
from fastmask.testing import as_integers, assert_same_bits, mask, values

OPTIONS = [
    {"momentum": mu, "dampening": damp, "weight_decay": wd, "nesterov": nesterov, "maximize": up}
    for mu, damp, wd, nesterov, up in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not nesterov or (mu and not damp)
]
NESTEROV = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}{value:g}" for key, value in options.items() if value) or "plain"


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(values(64, 64, dtype=dtype)), nn.Parameter(values(33, 7, dtype=dtype))]


def run(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Steps on gradients that depend on the step and the parameters alone."""
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                noise = values(*param.shape, seed=100 * step + i, dtype=param.dtype)
                param.grad = noise + 0.1 * param.detach()
        optimizer.step()


def assert_same_run(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, where: Tensor | None = None
) -> None:
    """Parameters and state of two optimizers are the same integers."""
    pairs = zip(
        itertools.chain.from_iterable(g["params"] for g in ours.param_groups),
        itertools.chain.from_iterable(g["params"] for g in theirs.param_groups),
        strict=True,
    )
    for mine, other in pairs:
        assert_same_bits(mine, other, where)
        assert ours.state[mine].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            assert_same_bits(ours.state[mine][key], value, where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_nothing_frozen_is_torchs_trajectory(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    empty = {ours[1]: BitMask.zeros((33, 7))}
    optimizers = (
        MaskedSGD(ours, lr=0.01, **options, frozen=empty),
        torch.optim.SGD(theirs, lr=0.01, **options),
    )
    for optimizer in optimizers:
        run(optimizer, 50)
    assert_same_run(*optimizers)


def test_torchs_foreach_has_the_same_bits_in_float32() -> None:
    ours, theirs = parameters(), parameters()
    optimizers = MaskedSGD(ours, **NESTEROV), torch.optim.SGD(theirs, **NESTEROV, foreach=True)
    for optimizer in optimizers:
        run(optimizer, 50)
    assert_same_run(*optimizers)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_entries_keep_their_bits_and_free_ones_torchs(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Gradients here depend on their own entry alone, so free entries go where torch takes them."""
    ours, theirs = parameters(dtype), parameters(dtype)
    frozen = mask(64, 64)
    frozen[0, :3] = True
    with torch.no_grad():
        for params in (ours, theirs):
            params[0][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    start = ours[0].detach().clone()
    masked = MaskedSGD(ours, **NESTEROV, **options, frozen={ours[0]: BitMask.from_bool(frozen)})
    plain = torch.optim.SGD(theirs, **NESTEROV)
    for optimizer in (masked, plain):
        run(optimizer, 50)
    assert_same_bits(ours[0], start, where=frozen)
    assert_same_bits(ours[0], theirs[0], where=~frozen)
    assert_same_bits(ours[1], theirs[1])
    # In bfloat16 an entry may come back to the very value it began with.
    assert (as_integers(ours[0]) != as_integers(start))[~frozen].float().mean() > 0.95
    assert not masked.state[ours[0]]["momentum_buffer"][frozen].any()


def test_all_frozen_leaves_the_model_as_it_is() -> None:
    params = parameters()
    start = [p.detach().clone() for p in params]
    frozen = {p: BitMask.ones(p.shape) for p in params}
    run(MaskedSGD(params, **NESTEROV, frozen=frozen), 50)
    for param, before in zip(params, start, strict=True):
        assert_same_bits(param, before)


def test_masks_switch_in_the_middle_and_stale_momentum_is_forgotten() -> None:
    params = parameters()
    first, second = BitMask.from_bool(mask(64, 64)), BitMask.from_bool(mask(64, 64, seed=1))
    optimizer = MaskedSGD(params, **NESTEROV)
    run(optimizer, 10)
    for bits in (first, second):
        optimizer.set_frozen({params[0]: bits})
        assert dict(optimizer.frozen) == {params[0]: bits}
        assert not optimizer.state[params[0]]["momentum_buffer"][bits.to_bool()].any()
        start = params[0].detach().clone()
        run(optimizer, 10)
        assert_same_bits(params[0], start, where=bits.to_bool())
    optimizer.set_frozen(None)
    start = params[0].detach().clone()
    run(optimizer, 1)
    assert (params[0] != start).all()


def test_state_dicts_are_torchs_both_ways() -> None:
    ours, theirs = parameters(), parameters()
    masked, plain = MaskedSGD(ours, **NESTEROV), torch.optim.SGD(theirs, **NESTEROV)
    run(plain, 10)
    state = copy.deepcopy(plain.state_dict())
    masked.load_state_dict(state)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for optimizer in (masked, plain):
        run(optimizer, 10, start=10)
    assert_same_run(masked, plain)
    assert masked.state_dict().keys() == plain.state_dict().keys()
    assert masked.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    again = torch.optim.SGD(theirs, **NESTEROV)
    again.load_state_dict(copy.deepcopy(masked.state_dict()))
    for optimizer in (masked, again):
        run(optimizer, 10, start=20)
    assert_same_run(masked, again)


def test_a_loaded_state_is_zero_where_frozen_and_the_callers_own_is_untouched() -> None:
    params = parameters()
    plain = torch.optim.SGD(params, **NESTEROV)
    run(plain, 5)
    state = plain.state_dict()
    kept = copy.deepcopy(state)
    bits = BitMask.from_bool(mask(64, 64))
    masked = MaskedSGD(params, **NESTEROV, frozen={params[0]: bits})
    masked.load_state_dict(state)
    assert not masked.state[params[0]]["momentum_buffer"][bits.to_bool()].any()
    assert_same_bits(state["state"][0]["momentum_buffer"], kept["state"][0]["momentum_buffer"])


def test_resuming_equals_an_uninterrupted_run() -> None:
    bits = BitMask.from_bool(mask(64, 64))
    whole = parameters()
    uninterrupted = MaskedSGD(whole, **NESTEROV, frozen={whole[0]: bits})
    run(uninterrupted, 20)
    saved = parameters()
    before = MaskedSGD(saved, **NESTEROV, frozen={saved[0]: bits})
    run(before, 9)
    file = io.BytesIO()
    torch.save({"params": [p.data for p in saved], "optimizer": before.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p) for p in checkpoint["params"]]
    after = MaskedSGD(resumed, **NESTEROV, frozen={resumed[0]: bits})
    after.load_state_dict(checkpoint["optimizer"])
    run(after, 11, start=9)
    assert_same_run(after, uninterrupted)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies_and_pickles_keep_masks_and_go_their_own_way(duplicate: Any) -> None:
    params = parameters()
    bits = BitMask.from_bool(mask(64, 64))
    optimizer = MaskedSGD(params, **NESTEROV, frozen={params[0]: bits})
    run(optimizer, 5)
    other_params, other = duplicate((params, optimizer))
    assert list(other.frozen) == [other_params[0]]
    start = params[0].detach().clone()
    run(other, 5, start=5)
    assert_same_bits(params[0], start)
    run(optimizer, 5, start=5)
    assert_same_run(other, optimizer)


def test_groups_schedulers_closures_and_zero_grad() -> None:
    params, theirs = parameters(), parameters()
    bits = BitMask.from_bool(mask(64, 64))
    histories = []
    for cls, (w, b), extra in (
        (MaskedSGD, params, {"frozen": {params[0]: bits}}),
        (torch.optim.SGD, theirs, {}),
    ):
        optimizer = cls([{"params": [w], "lr": 0.5, "momentum": 0.5}], lr=0.1, **extra)
        optimizer.add_param_group({"params": [b], "weight_decay": 0.1})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

        def closure(o: Any = optimizer, pair: Any = (w, b)) -> Tensor:
            o.zero_grad()
            loss = pair[0].square().mean() + (pair[1] - 1).square().mean()
            loss.backward()
            return loss

        histories.append([optimizer.step(closure).item()])
        for _ in range(10):
            scheduler.step()
            optimizer.step(closure)
        optimizer.zero_grad()
        assert w.grad is None
    assert histories[0] == histories[1]
    start = values(64, 64)
    assert_same_bits(params[0], start, where=bits.to_bool())
    assert_same_bits(params[0], theirs[0], where=~bits.to_bool())
    assert_same_bits(params[1], theirs[1])


def test_a_parameter_without_gradient_is_left_out() -> None:
    params = parameters()
    optimizer = MaskedSGD(params, **NESTEROV)
    params[0].grad = torch.ones_like(params[0])
    start = params[1].detach().clone()
    optimizer.step()
    assert_same_bits(params[1], start)
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    run(optimizer, 2)
    assert (params[1] != start).all()


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_scales_clips_and_skips(fused: bool) -> None:
    params, theirs = parameters(), parameters()
    frozen = mask(64, 64)
    masked = MaskedSGD(params, **NESTEROV, fused=fused,
                       frozen={params[0]: BitMask.from_bool(frozen)})  # fmt: skip
    plain = torch.optim.SGD(theirs, **NESTEROV)
    for (w, b), optimizer in ((params, masked), (theirs, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(10):
            optimizer.zero_grad()
            loss = (w * values(64, 64, seed=step)).sum() + b.square().sum()
            scaler.scale(loss).backward()
            if step == 4:
                assert b.grad is not None
                b.grad[0, 0] = float("inf")
            before = w.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert bool((w == before).all()) == (step == 4)
        assert scaler.get_scale() == 2.0**9
    assert_same_bits(params[0], values(64, 64), where=frozen)
    assert_same_bits(params[0], theirs[0], where=~frozen)


def test_what_it_refuses() -> None:
    params = parameters()
    bits = BitMask.from_bool(mask(64, 64))

    def refuse(kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            MaskedSGD(params, **{"lr": 0.1, **options})

    refuse(ValueError, "differentiable: expected False", differentiable=True)
    refuse(ValueError, "Invalid learning rate", lr=-1.0)
    refuse(ValueError, "Nesterov momentum requires", nesterov=True)
    refuse(TypeError, "frozen: expected a mapping of parameters", frozen=[bits])
    refuse(TypeError, "frozen: expected parameters as keys, got str", frozen={"weight": bits})
    refuse(ValueError, r"a parameter of shape \(64, 64\) is not in the optimizer",
           frozen={nn.Parameter(values(64, 64)): bits})  # fmt: skip
    refuse(TypeError, "expected a BitMask .* for parameter 0 of group 0, got Tensor",
           frozen={params[0]: mask(64, 64)})  # fmt: skip
    refuse(ValueError, r"expected a mask of shape \(33, 7\) for parameter 1 of group 0, got \(64, 64\)",
           frozen={params[1]: bits})  # fmt: skip
    refuse(ValueError, "expected a mask on cpu for parameter 0 of group 0, got one on meta",
           frozen={params[0]: bits.to("meta")})  # fmt: skip
    named = MaskedSGD([("weight", params[0])], lr=0.1, frozen={params[0]: bits})
    with pytest.raises(ValueError, match="for weight, got"):
        named.set_frozen({params[0]: BitMask.zeros((64,))})
    assert dict(named.frozen) == {params[0]: bits}
    params[0].grad = values(64, 64).to_sparse()
    with pytest.raises(TypeError, match="expected a dense tensor, got torch.sparse_coo"):
        named.step()
    whole = nn.Parameter(values(3, 4).cfloat())
    whole.grad = values(3, 4).cfloat()
    with pytest.raises(TypeError, match="expected dtype .* got torch.complex64"):
        MaskedSGD([whole], lr=0.1).step()
    with pytest.raises(TypeError, match="expected parameter 0 of group 0 to be real floating"):
        MaskedSGD([whole], lr=0.1, frozen={whole: BitMask.zeros((3, 4))})
