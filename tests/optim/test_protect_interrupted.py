"""protect where a step does not run from its start to its end: it raises, or calls another's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_setups import Problem
from torch import Tensor, nn

from fastmask.optim import protect
from fastmask.testing import assert_same_bits, values


class Fails(torch.optim.SGD):
    """Moves everything, then fails, as one that runs out of memory in its last tensor."""

    armed = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            param.sub_(0.1)
        if self.armed:
            raise MemoryError


def test_a_step_that_raises_is_made_good_by_restore_by_the_next_step_and_by_remove() -> None:
    for repair in ("restore", "step", "remove", "with"):
        problem = Problem()
        start = problem.w.detach().clone()
        optimizer = Fails(problem.params)
        protection = protect(optimizer, problem.frozen)
        problem.loss().backward()
        if repair == "with":
            with pytest.raises(MemoryError), protection:
                optimizer.step()
        else:
            with pytest.raises(MemoryError):
                optimizer.step()
            assert (problem.w != start)[problem.ones].any()
            optimizer.armed = False
            getattr(optimizer if repair == "step" else protection, repair)()
        assert_same_bits(problem.w, start, where=problem.ones)
        assert (problem.w != start)[~problem.ones].any()


class DecaysAround(torch.optim.AdamW):
    """Moves everything before and after the step of its base class, whose hooks run within its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for factor in (0.9, 0.8):
            for param in self.param_groups[0]["params"]:
                param.mul_(factor)
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                param.mul_(factor)


def test_a_step_that_calls_its_base_classs() -> None:
    torch.optim.AdamW([nn.Parameter(values(1))]), DecaysAround([nn.Parameter(values(1))])
    assert torch.optim.AdamW.step.hooked and DecaysAround.step.hooked  # type: ignore[attr-defined]
    problem = Problem()
    optimizer = DecaysAround(problem.params)
    protect(optimizer, problem.frozen)
    problem.train(optimizer, 3)
    assert_same_bits(problem.w, Problem().w, where=problem.ones)
    assert (problem.w != Problem().w)[~problem.ones].all()


def test_a_state_loaded_after_a_step_that_raised_is_a_new_start() -> None:
    problem = Problem()
    optimizer = Fails(problem.params)
    protect(optimizer, problem.frozen)
    problem.loss().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    loaded = values(64, 64, seed=77)
    with torch.no_grad():
        problem.w.copy_(loaded)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.armed = False
    problem.train(optimizer, 3)
    assert_same_bits(problem.w, loaded, where=problem.ones)


def test_a_closure_that_raises_within_lbfgs() -> None:
    problem = Problem()
    start = problem.w.detach().clone()
    optimizer = torch.optim.LBFGS(problem.params, lr=0.1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ArithmeticError("loss is NaN")
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError), protect(optimizer, problem.frozen):
        optimizer.step(closure)
    assert_same_bits(problem.w, start, where=problem.ones)
    assert (problem.w != start)[~problem.ones].all()
