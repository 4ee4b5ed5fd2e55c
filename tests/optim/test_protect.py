"""protect: what happens around the steps, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from optimizer_setups import Problem
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.errors import FrozenEntriesMoved
from fastmask.optim import MaskedSGD, protect, verify_frozen
from fastmask.testing import assert_same_bits, mask, values


def warm(problem: Problem, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(problem.params, lr=0.01, weight_decay=0.1, **options)
    problem.train(optimizer, 10)
    return optimizer


def test_a_checkpoint_loaded_in_between_is_kept() -> None:
    problem = Problem()
    optimizer = warm(problem)
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 5)
    loaded = values(64, 64, seed=77)
    with torch.no_grad():
        problem.w.copy_(loaded)
    problem.train(optimizer, 5)
    assert_same_bits(problem.w, loaded, where=problem.ones)
    problem.w.data = values(64, 64, seed=78)
    problem.train(optimizer, 5)
    assert_same_bits(problem.w, values(64, 64, seed=78), where=problem.ones)


def test_clipping_does_not_count_frozen_gradients() -> None:
    problem = Problem()
    problem.loss().backward()
    assert problem.w.grad is not None and problem.v.grad is not None
    free = torch.where(problem.ones, 0, problem.w.grad)
    want = torch.stack([free.norm(), problem.v.grad.norm()]).norm()
    whole = nn.utils.get_total_norm([problem.w.grad, problem.v.grad])
    optimizer = warm(problem)
    problem = Problem()
    optimizer = torch.optim.AdamW(problem.params)
    protect(optimizer, problem.frozen)
    problem.loss().backward()
    assert_same_bits(torch.nn.utils.clip_grad_norm_(problem.params, 1.0), want)
    assert want < whole


def test_gradients_accumulate_over_several_backward_passes() -> None:
    problem, bare = Problem(), Problem()
    protect(torch.optim.SGD(problem.params, lr=0.1), problem.frozen)
    for p in (problem, bare):
        for rows in (slice(0, 100), slice(100, 320)):
            p.loss(rows).backward()
    assert problem.w.grad is not None and bare.w.grad is not None
    assert not problem.w.grad[problem.ones].any()
    assert_same_bits(problem.w.grad, bare.w.grad, where=~problem.ones)


def test_a_gradient_set_by_hand_is_zeroed_at_the_step() -> None:
    problem = Problem()
    optimizer = torch.optim.Muon(problem.params)
    problem.w.grad = torch.where(problem.ones, float("nan"), torch.ones(64, 64))
    protect(optimizer, problem.frozen)
    assert not problem.w.grad[problem.ones].any(), "also one that is there already"
    problem.w.grad = torch.where(problem.ones, float("nan"), torch.ones(64, 64))
    start = problem.w.detach().clone()
    optimizer.step()
    assert_same_bits(problem.w, start, where=problem.ones)
    assert problem.w.isfinite().all()


def test_a_parameter_that_requires_a_gradient_only_later() -> None:
    problem = Problem()
    problem.w.requires_grad_(False)
    optimizer = torch.optim.AdamW(problem.params)
    protect(optimizer, problem.frozen)
    assert not problem.w.requires_grad
    problem.train(optimizer, 2)
    problem.w.requires_grad_()
    problem.loss().backward()
    assert problem.w.grad is not None
    assert not problem.w.grad[problem.ones].any()


def test_parameters_in_two_groups_one_of_them_added_later() -> None:
    problem = Problem()
    optimizer = torch.optim.AdamW([problem.w], weight_decay=0.1)
    first = protect(optimizer, problem.frozen)
    optimizer.add_param_group({"params": [problem.v], "weight_decay": 0.5})
    problem.train(optimizer, 3)
    assert (problem.v != Problem().v).all(), "free until protected"
    ones = mask(64, 16)
    second = protect(optimizer, {problem.v: BitMask.from_bool(ones)})
    start = problem.v.detach().clone()
    problem.train(optimizer, 10)
    assert_same_bits(problem.v, start, where=ones)
    assert_same_bits(problem.w, Problem().w, where=problem.ones)
    first.remove()
    problem.train(optimizer, 1)
    assert (problem.w != Problem().w).all()
    assert_same_bits(problem.v, start, where=ones)
    assert list(second.frozen) == [problem.v] and not first.frozen


def test_two_protections_of_one_parameter_freeze_the_union() -> None:
    problem = Problem()
    optimizer = warm(problem)
    start = problem.w.detach().clone()
    other = mask(64, 64, seed=9)
    protect(optimizer, problem.frozen)
    protect(optimizer, {problem.w: BitMask.from_bool(other)})
    problem.train(optimizer, 10)
    assert_same_bits(problem.w, start, where=problem.ones | other)
    assert (problem.w != start)[~(problem.ones | other)].all()


def test_a_state_loaded_after_is_zeroed_where_frozen_and_the_callers_own_is_not() -> None:
    stale, problem = Problem(), Problem()
    state = warm(stale).state_dict()
    kept = copy.deepcopy(state)
    optimizer = torch.optim.AdamW(problem.params)
    protect(optimizer, problem.frozen)
    optimizer.load_state_dict(state)
    for key in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[problem.w][key][problem.ones].any()
        assert_same_bits(state["state"][0][key], kept["state"][0][key])
    problem.train(optimizer, 10)
    assert_same_bits(problem.w, Problem().w, where=problem.ones)


def test_a_hook_of_others_that_replaces_the_steps_arguments() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.params, lr=0.1, weight_decay=0.1)
    protect(optimizer, problem.frozen)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, dict(kwargs)))
    problem.train(optimizer, 3)
    assert_same_bits(problem.w, Problem().w, where=problem.ones)
    loaded = values(64, 64, seed=77)
    with torch.no_grad():
        problem.w.copy_(loaded)
    problem.train(optimizer, 3)
    assert_same_bits(problem.w, loaded, where=problem.ones)


def test_a_model_cast_between_steps() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.params, lr=0.1, weight_decay=0.1)
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 2)
    for param in problem.params:
        param.data = param.data.double()
        param.grad = None
    problem.x, problem.y = problem.x.double(), problem.y.double()
    problem.train(optimizer, 2)
    assert_same_bits(problem.w, Problem().w.double(), where=problem.ones)


def test_lbfgs_goes_where_it_would_go_with_the_free_entries_alone() -> None:
    """Frozen entries have gradient 0 in its flat history, so they take no part in its products."""
    problem, alone = Problem(), Problem()
    optimizer = torch.optim.LBFGS(problem.params, lr=0.1)
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 2)
    base = alone.w.detach().clone()
    free = nn.Parameter(base[~alone.ones].clone())
    compact = torch.optim.LBFGS([free, alone.v], lr=0.1)

    def closure() -> Tensor:
        compact.zero_grad()
        alone.w = base.masked_scatter(~alone.ones, free)  # type: ignore[assignment]
        loss = alone.loss()
        loss.backward()
        return loss

    for _ in range(2):
        compact.step(closure)
    # Sums over 5,120 and over 3,000 entries round apart, and 40 iterations carry that on.
    torch.testing.assert_close(problem.w[~problem.ones], free, rtol=1e-3, atol=1e-3)


def test_asgd_averages_hold_the_frozen_values() -> None:
    problem = Problem()
    optimizer = torch.optim.ASGD(problem.params, lr=0.1, lambd=0.1, t0=0)
    problem.train(optimizer, 10)
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 10)
    assert_same_bits(optimizer.state[problem.w]["ax"], problem.w.detach(), where=problem.ones)


def test_schedulers_and_masked_optimizers_take_it_too() -> None:
    problem = Problem()
    optimizer = MaskedSGD(problem.params, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    protect(optimizer, problem.frozen)
    for _ in range(20):
        problem.train(optimizer, 1)
        scheduler.step()
    assert_same_bits(problem.w, Problem().w, where=problem.ones)
    with pytest.raises(FrozenEntriesMoved):
        verify_frozen({problem.v: Problem().v}, {problem.v: problem.v},
                      {problem.v: BitMask.ones((64, 16))})  # fmt: skip


def test_a_compiled_step() -> None:
    problem = Problem()
    optimizer = warm(problem)
    start = problem.w.detach().clone()
    protect(optimizer, problem.frozen)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss().backward()
        step()
    assert_same_bits(problem.w, start, where=problem.ones)
    assert (problem.w != start)[~problem.ones].all()


def test_it_stays_without_a_handle_and_goes_with_the_optimizer() -> None:
    problem = Problem()
    optimizer = warm(problem)
    start = problem.w.detach().clone()
    protect(optimizer, problem.frozen)
    gc.collect()
    problem.train(optimizer, 3)
    assert_same_bits(problem.w, start, where=problem.ones)
    gone = weakref.ref(protect(optimizer, problem.frozen))
    del optimizer
    gc.collect()
    assert gone() is None


def test_removing_twice_and_copying_the_model() -> None:
    problem = Problem()
    optimizer = warm(problem)
    protection = protect(optimizer, problem.frozen)
    other = copy.deepcopy(problem.w)
    other.square().sum().backward()
    assert other.grad is not None and other.grad.all(), "a copy is not held"
    for _ in range(2):
        protection.remove()
    problem.loss().backward()
    assert problem.w.grad is not None and problem.w.grad[problem.ones].any()


def test_an_empty_and_a_scalar_parameter() -> None:
    params = [nn.Parameter(values(0, 3)), nn.Parameter(values(1)[0]), nn.Parameter(values(1))]
    optimizer = torch.optim.Adam(params, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    start = [p.detach().clone() for p in params]
    protect(optimizer, {p: BitMask.ones(p.shape) for p in params})
    for _ in range(3):
        sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    for param, before in zip(params, start, strict=True):
        assert_same_bits(param, before)
    assert optimizer.state[params[1]]["step"] == 6, "a count is no stale state"


def test_what_it_refuses() -> None:
    problem = Problem()
    optimizer = torch.optim.AdamW(problem.params)
    bits = problem.frozen[problem.w]
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got Linear"):
        protect(nn.Linear(2, 2), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frozen: expected a mapping of parameters"):
        protect(optimizer, [bits])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not in the optimizer"):
        protect(optimizer, {nn.Parameter(values(64, 64)): bits})
    with pytest.raises(TypeError, match="expected a BitMask .* got Tensor"):
        protect(optimizer, {problem.w: problem.ones})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"expected a mask of shape \(64, 16\)"):
        protect(optimizer, {problem.v: bits})
    with pytest.raises(ValueError, match="expected a mask on cpu"):
        protect(optimizer, {problem.w: bits.to("meta")})
    sharded = nn.Parameter(values(64, 64))
    sharded.placements = ()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="parameter 0 of group 0 is sharded"):
        protect(torch.optim.SGD([sharded], lr=0.1), {sharded: bits})
    different = torch.optim.SGD(problem.params, lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="differentiable=False"):
        protect(different, problem.frozen)
    assert not optimizer._optimizer_step_pre_hooks, "a refusal leaves no hook behind"


def test_sparse_gradients_are_refused() -> None:
    weight = nn.Parameter(values(10, 4))
    optimizer = torch.optim.SparseAdam([weight])
    protect(optimizer, {weight: BitMask.from_bool(mask(10, 4))})
    start = weight.detach().clone()
    with pytest.raises(TypeError, match="expected a dense gradient"):
        nn.functional.embedding(torch.tensor([1, 3]), weight, sparse=True).sum().backward()
    weight.grad = torch.ones(10, 4).to_sparse()
    with pytest.raises(TypeError, match="expected a dense gradient"):
        optimizer.step()
    assert_same_bits(weight, start)
