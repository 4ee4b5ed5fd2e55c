"""protect under every optimizer of torch.optim and each of its options, compared as integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_setups import NAMES, SETUPS, Problem, optimizers
from torch import Tensor

from fastmask import BitMask
from fastmask.optim import protect
from fastmask.testing import as_integers, assert_same_bits

PLAIN = [(name, cls, options) for name, cls, options in SETUPS if "-" not in name]
setup = pytest.mark.parametrize("name, cls, options", SETUPS, ids=NAMES)
plain = pytest.mark.parametrize("name, cls, options", PLAIN, ids=[name for name, _, _ in PLAIN])
Optimizer = type[torch.optim.Optimizer]


def moved(tensor: Tensor, start: Tensor) -> Tensor:
    return as_integers(tensor) != as_integers(start)


def test_every_optimizer_of_torch_is_here() -> None:
    assert {cls for _, cls, _ in SETUPS} == set(optimizers().values()) - {torch.optim.SparseAdam}
    assert len(SETUPS) > 5 * len(PLAIN)


@setup
@pytest.mark.parametrize("warm", [0, 10], ids=["fresh", "warm"])
def test_fifty_steps(name: str, cls: Optimizer, options: dict[str, Any], warm: int) -> None:
    problem = Problem()
    # NaN, infinity and -0.0, frozen and out of the forward pass; NaN gradients where frozen.
    problem.unread[0, :3] = problem.ones[0, :3] = True
    problem.frozen = {problem.w: BitMask.from_bool(problem.ones)}
    optimizer = cls(problem.params, **options)
    problem.train(optimizer, warm)
    with torch.no_grad():
        problem.w[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    start = problem.w.detach().clone()
    problem.w.register_hook(lambda grad: torch.where(problem.ones, float("nan"), grad))
    with protect(optimizer, problem.frozen):
        problem.train(optimizer, 50)
    assert_same_bits(problem.w, start, where=problem.ones)
    assert moved(problem.w, start)[~problem.ones].float().mean() > 0.95
    assert problem.w[~problem.ones].isfinite().all()


@plain
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(
    name: str, cls: Optimizer, options: dict[str, Any], dtype: torch.dtype
) -> None:
    problem = Problem(dtype)
    optimizer = cls(problem.params, **options)
    problem.train(optimizer, 10)
    start = problem.w.detach().clone()
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 50)
    assert_same_bits(problem.w, start, where=problem.ones)
    # Steps of 1e-3 are often rounded away in bfloat16.
    share = 0.95 if dtype == torch.float64 else 0.0
    assert moved(problem.w, start)[~problem.ones].float().mean() > share


@setup
def test_nothing_frozen_is_the_same_trajectory(
    name: str, cls: Optimizer, options: dict[str, Any]
) -> None:
    bare, held = Problem(), Problem()
    optimizers = [cls(problem.params, **options) for problem in (bare, held)]
    protect(optimizers[1], {p: BitMask.zeros(p.shape) for p in held.params})
    for problem, optimizer in zip((bare, held), optimizers, strict=True):
        problem.train(optimizer, 20)
    for p, q in zip(bare.params, held.params, strict=True):
        assert_same_bits(q, p)
        for key, value in optimizers[0].state[p].items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                assert_same_bits(optimizers[1].state[q][key], value)


@setup
def test_all_frozen_leaves_the_model_as_it_is(
    name: str, cls: Optimizer, options: dict[str, Any]
) -> None:
    problem = Problem()
    optimizer = cls(problem.params, **options)
    problem.train(optimizer, 3)
    start = [p.detach().clone() for p in problem.params]
    protect(optimizer, {p: BitMask.ones(p.shape) for p in problem.params})
    problem.train(optimizer, 10)
    for param, before in zip(problem.params, start, strict=True):
        assert_same_bits(param, before)


@setup
def test_resuming_equals_an_uninterrupted_run(
    name: str, cls: Optimizer, options: dict[str, Any]
) -> None:
    whole, first, second = Problem(), Problem(), Problem()
    optimizer = cls(whole.params, **options)
    protect(optimizer, whole.frozen)
    whole.train(optimizer, 20)
    optimizer = cls(first.params, **options)
    protect(optimizer, first.frozen)
    first.train(optimizer, 9)
    with torch.no_grad():
        for p, q in zip(second.params, first.params, strict=True):
            p.copy_(q)
    resumed = cls(second.params, **options)
    protect(resumed, second.frozen)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.train(resumed, 11)
    for p, q in zip(whole.params, second.params, strict=True):
        assert_same_bits(q, p)


@plain
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_skipped_steps(
    name: str, cls: Optimizer, options: dict[str, Any], fused: bool
) -> None:
    if cls is torch.optim.LBFGS:
        pytest.skip("GradScaler refuses optimizers that take a closure")
    if fused:
        if f"{name}-fused" not in NAMES:
            pytest.skip(f"{name} has no fused form")
        options = {**options, "fused": True}
    problem = Problem()
    optimizer = cls(problem.params, **options)
    problem.train(optimizer, 10)
    start = problem.w.detach().clone()
    protection = protect(optimizer, problem.frozen)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = problem.loss()
        scaler.scale(loss).backward()
        assert problem.v.grad is not None
        if step % 5 == 2:
            problem.v.grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in problem.params]
        scaler.step(optimizer)
        scaler.update()
        skipped = all(bool((p == b).all()) for p, b in zip(problem.params, before, strict=True))
        assert skipped == (step % 5 == 2)
        assert_same_bits(problem.w, start, where=problem.ones)
    assert scaler.get_scale() == 2.0**6
    assert moved(problem.w, start)[~problem.ones].float().mean() > 0.5
    protection.remove()


@plain
def test_stale_state_is_gone_at_frozen_entries_and_kept_elsewhere(
    name: str, cls: Optimizer, options: dict[str, Any]
) -> None:
    problem = Problem()
    optimizer = cls(problem.params, **options)
    problem.train(optimizer, 10)
    before = copy.copy(optimizer.state[problem.w])
    protect(optimizer, problem.frozen)
    after = optimizer.state[problem.w]
    if cls is torch.optim.LBFGS:
        assert not after, "a history that knows frozen entries starts anew"
    for key, value in after.items():
        if isinstance(value, Tensor) and value.shape == problem.w.shape:
            assert_same_bits(value, before[key], where=~problem.ones)
            if key not in ("step_size", "ax"):
                assert not value[problem.ones].any()
