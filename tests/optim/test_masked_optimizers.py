"""MaskedSGD and MaskedAdamW: frozen entries as integers, and all the habits of torch's optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from masked_runs import PAIRS, assert_same_run, moments, name, parameters, run
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.optim import MaskedAdamW
from fastmask.testing import as_integers, assert_same_bits, mask, values

both = pytest.mark.parametrize(
    "masked, plain, options", PAIRS, ids=[cls.__name__ for cls, _, _ in PAIRS]
)
BITS = BitMask.from_bool(mask(64, 64))


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@both
@pytest.mark.usefixtures("torchs_bits")
def test_frozen_entries_keep_their_bits_and_free_ones_torchs(
    masked: Any, plain: Any, options: dict[str, Any], form: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    frozen = mask(64, 64)
    frozen[0, :3] = True
    with torch.no_grad():
        for params in (ours, theirs):
            params[0][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    start = ours[0].detach().clone()
    optimizer = masked(ours, **options, **form, frozen={ours[0]: BitMask.from_bool(frozen)})
    run(optimizer, 50)
    run(plain(theirs, **options), 50)
    assert_same_bits(ours[0], start, where=frozen)
    assert_same_bits(ours[0], theirs[0], where=~frozen)
    assert_same_bits(ours[1], theirs[1])
    # In bfloat16 an entry may come back to the very value it began with.
    assert (as_integers(ours[0]) != as_integers(start))[~frozen].float().mean() > 0.95
    for moment in moments(optimizer, ours[0]):
        assert not moment[frozen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_frozen_entries_change_no_bit_of_the_others(
    masked: Any, plain: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """On whatever back end runs: each entry is computed alike, wherever it lies and beside whatever."""
    ours, free = parameters(dtype), parameters(dtype)
    start = ours[0].detach().clone()
    run(masked(ours, **options, frozen={ours[0]: BITS}), 50)
    run(masked(free, **options), 50)
    assert_same_bits(ours[0], start, where=BITS.to_bool())
    assert_same_bits(ours[0], free[0], where=~BITS.to_bool())
    assert_same_bits(ours[1], free[1])


@both
def test_nan_gradients_at_frozen_entries_do_no_harm(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS})
    for step in range(5):
        params[0].grad = values(64, 64, seed=step).masked_fill(BITS.to_bool(), float("nan"))
        optimizer.step()
    assert params[0].isfinite().all()
    assert all(moment.isfinite().all() for moment in moments(optimizer, params[0]))


@both
def test_all_frozen_leaves_the_model_as_it_is(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    start = [p.detach().clone() for p in params]
    run(masked(params, **options, frozen={p: BitMask.ones(p.shape) for p in params}), 50)
    for param, before in zip(params, start, strict=True):
        assert_same_bits(param, before)


@both
def test_masks_switch_in_the_middle_and_stale_state_is_forgotten(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = masked(params, **options)
    run(optimizer, 10)
    for bits in (BITS, BitMask.from_bool(mask(64, 64, seed=1))):
        optimizer.set_frozen({params[0]: bits})
        assert dict(optimizer.frozen) == {params[0]: bits}
        for moment in moments(optimizer, params[0]):
            assert not moment[bits.to_bool()].any()
            assert moment[~bits.to_bool()].any()
        start = params[0].detach().clone()
        run(optimizer, 10)
        assert_same_bits(params[0], start, where=bits.to_bool())
    optimizer.set_frozen(None)
    start = params[0].detach().clone()
    run(optimizer, 1)
    assert (params[0] != start).all()


@both
@pytest.mark.usefixtures("torchs_bits")
def test_state_dicts_are_torchs_both_ways(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    one, other = masked(ours, **options), plain(theirs, **options)
    run(other, 10)
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for optimizer in (one, other):
        run(optimizer, 10, start=10)
    assert_same_run(one, other)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    again = plain(theirs, **options)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer in (one, again):
        run(optimizer, 10, start=20)
    assert_same_run(one, again)


@both
def test_a_loaded_state_is_zero_where_frozen_and_the_callers_own_is_untouched(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = plain(params, **options)
    run(optimizer, 5)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    loaded = masked(params, **options, frozen={params[0]: BITS})
    loaded.load_state_dict(state)
    for moment in moments(loaded, params[0]):
        assert not moment[BITS.to_bool()].any()
    for key, value in kept["state"][0].items():
        assert_same_bits(state["state"][0][key], value)


@both
def test_resuming_equals_an_uninterrupted_run(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    whole, saved = parameters(), parameters()
    uninterrupted = masked(whole, **options, frozen={whole[0]: BITS})
    run(uninterrupted, 20)
    before = masked(saved, **options, frozen={saved[0]: BITS})
    run(before, 9)
    file = io.BytesIO()
    torch.save({"params": [p.data for p in saved], "optimizer": before.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p) for p in checkpoint["params"]]
    after = masked(resumed, **options, frozen={resumed[0]: BITS})
    after.load_state_dict(checkpoint["optimizer"])
    run(after, 11, start=9)
    assert_same_run(after, uninterrupted)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
@both
def test_copies_and_pickles_keep_masks_and_go_their_own_way(
    masked: Any, plain: Any, options: dict[str, Any], duplicate: Any
) -> None:
    params = parameters()
    optimizer = masked(params, **options, frozen={params[0]: BITS})
    run(optimizer, 5)
    other_params, other = duplicate((params, optimizer))
    assert list(other.frozen) == [other_params[0]]
    start = params[0].detach().clone()
    run(other, 5, start=5)
    assert_same_bits(params[0], start)
    run(optimizer, 5, start=5)
    assert_same_run(other, optimizer)


@both
@pytest.mark.usefixtures("torchs_bits")
def test_groups_schedulers_closures_and_zero_grad(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params, theirs = parameters(), parameters()
    losses = []
    for cls, (w, b), extra in (
        (masked, params, {"frozen": {params[0]: BITS}}),
        (plain, theirs, {}),
    ):
        optimizer = cls([{"params": [w], "lr": 0.5, "weight_decay": 0.0}], **options, **extra)
        optimizer.add_param_group({"params": [b], "weight_decay": 0.2})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

        def closure(o: Any = optimizer, pair: Any = (w, b)) -> Tensor:
            o.zero_grad()
            loss = pair[0].square().mean() + (pair[1] - 1).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        for _ in range(10):
            scheduler.step()
            optimizer.step(closure)
        optimizer.zero_grad()
        assert w.grad is None
    assert losses[0] == losses[1]
    frozen = BITS.to_bool()
    assert_same_bits(params[0], values(64, 64), where=frozen)
    assert_same_bits(params[0], theirs[0], where=~frozen)
    assert_same_bits(params[1], theirs[1])


@both
def test_a_parameter_without_gradient_is_left_out(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = masked(params, **options)
    params[0].grad = torch.ones_like(params[0])
    start = params[1].detach().clone()
    optimizer.step()
    assert_same_bits(params[1], start)
    assert not optimizer.state.get(params[1])
    run(optimizer, 2)
    assert (params[1] != start).all()


@both
@pytest.mark.usefixtures("torchs_bits")
def test_parameters_of_several_dtypes(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    ours, theirs = ([parameters(kind)[0] for kind in kinds] for _ in range(2))
    one, other = masked(ours, **options), plain(theirs, **options)
    for optimizer in (one, other):
        run(optimizer, 5)
    assert_same_run(one, other)


@pytest.mark.parametrize("fused", [False, True])
@both
@pytest.mark.usefixtures("torchs_bits")
def test_grad_scaler_scales_clips_and_skips(
    masked: Any, plain: Any, options: dict[str, Any], fused: bool
) -> None:
    params, theirs = parameters(), parameters()
    one = masked(params, **options, fused=fused, frozen={params[0]: BITS})
    for (w, b), optimizer in ((params, one), (theirs, plain(theirs, **options))):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(10):
            optimizer.zero_grad()
            loss = (w * values(64, 64, seed=step)).sum() + b.square().sum()
            scaler.scale(loss).backward()
            if step == 4:
                assert b.grad is not None
                b.grad[0, 0] = float("inf")
            before = w.detach().clone()
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([b], 0.1)
            scaler.step(optimizer)
            scaler.update()
            assert bool((w == before).all()) == (step == 4)
        assert scaler.get_scale() == 2.0**9
    frozen = BITS.to_bool()
    assert_same_bits(params[0], values(64, 64), where=frozen)
    assert_same_bits(params[0], theirs[0], where=~frozen)
    assert_same_bits(params[1], theirs[1])


@both
def test_a_compiled_step_follows_a_learning_rate_tensor(
    masked: Any, plain: Any, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    optimizers = []
    for _ in range(2):
        params = parameters()
        rate = torch.tensor(options["lr"])
        optimizers.append(masked(params, **{**options, "lr": rate}, frozen={params[0]: BITS}))
    optimizers[1].step = torch.compile(optimizers[1].step, fullgraph=True, backend=counter)
    for step in range(6):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].mul_(0.9)
            run(optimizer, 1, start=step)
    assert_same_run(*optimizers)
    assert counter.frame_count <= 2, (
        "one for the first step, which makes the state, one for the rest"
    )


@both
def test_what_it_refuses(masked: Any, plain: Any, options: dict[str, Any]) -> None:
    params = parameters()

    def refuse(kind: type[Exception], match: str, **wrong: Any) -> None:
        with pytest.raises(kind, match=match):
            masked(params, **{"lr": 0.1, **wrong})

    refuse(ValueError, "differentiable: expected False", differentiable=True)
    refuse(ValueError, "Invalid learning rate", lr=-1.0)
    refuse(RuntimeError, "cannot be `True` together", foreach=True, fused=True)
    refuse(TypeError, "frozen: expected a mapping of parameters", frozen=[BITS])
    refuse(TypeError, "frozen: expected parameters as keys, got str", frozen={"weight": BITS})
    refuse(ValueError, r"a parameter of shape \(64, 64\) is not in the optimizer",
           frozen={nn.Parameter(values(64, 64)): BITS})  # fmt: skip
    refuse(TypeError, "expected a BitMask .* for parameter 0 of group 0, got Tensor",
           frozen={params[0]: mask(64, 64)})  # fmt: skip
    refuse(ValueError, r"expected a mask of shape \(33, 7\) for parameter 1 of group 0, got \(64, 64\)",
           frozen={params[1]: BITS})  # fmt: skip
    refuse(ValueError, "expected a mask on cpu for parameter 0 of group 0, got one on meta",
           frozen={params[0]: BITS.to("meta")})  # fmt: skip
    named = masked([("weight", params[0])], **options, frozen={params[0]: BITS})
    with pytest.raises(ValueError, match="for weight, got"):
        named.set_frozen({params[0]: BitMask.zeros((64,))})
    assert dict(named.frozen) == {params[0]: BITS}, "what was in force stays"
    start = params[0].detach().clone()
    params[0].grad = values(64, 64).to_sparse()
    with pytest.raises(TypeError, match=r"expected a dense tensor, got torch.sparse_coo"):
        named.step()
    assert_same_bits(params[0], start)
    whole = nn.Parameter(values(3, 4).cfloat())
    whole.grad = values(3, 4).cfloat()
    with pytest.raises(TypeError, match=r"expected dtype .* got torch.complex64"):
        masked([whole], **options).step()
    with pytest.raises(TypeError, match="expected parameter 0 of group 0 to be real floating"):
        masked([whole], **options, frozen={whole: BitMask.zeros((3, 4))})


def test_a_step_that_is_refused_leaves_no_half_written_state() -> None:
    params = parameters()
    optimizer = MaskedAdamW(params)
    params[0].grad = values(64, 64).to_sparse()
    with pytest.raises(TypeError, match="dense"):
        optimizer.step()
    run(optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 1
