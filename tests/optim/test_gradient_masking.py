"""Negative control: zeroed gradients alone do not freeze, so the tests beside this one can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_setups import GRADIENT_MASKING_HOLDS, Problem

from fastmask import BitMask
from fastmask.errors import FrozenEntriesMoved
from fastmask.optim import verify_frozen

IDS = ["-".join([name, *options]) for name, options, _, _ in GRADIENT_MASKING_HOLDS]


def moves(name: str, options: dict[str, Any], warm: int) -> bool:
    """Whether verify_frozen catches entries that moved in 50 steps with gradients zeroed by hand."""
    problem = Problem()
    optimizer = getattr(torch.optim, name)(problem.params, **options)
    problem.train(optimizer, warm)
    before = {problem.w: problem.w.detach().clone()}
    problem.train(optimizer, 50, problem.zero_frozen_gradients)
    try:
        verify_frozen(before, {problem.w: problem.w}, problem.frozen)
    except FrozenEntriesMoved:
        return True
    return False


@pytest.mark.parametrize("name, options, fresh, warm", GRADIENT_MASKING_HOLDS, ids=IDS)
def test_gradient_masking_alone(
    name: str, options: dict[str, Any], fresh: bool, warm: bool
) -> None:
    assert moves(name, options, warm=0) != fresh
    assert moves(name, options, warm=10) != warm


def test_thirteen_of_nineteen_fail() -> None:
    assert len(GRADIENT_MASKING_HOLDS) == 19
    assert sum(not warm for *_, warm in GRADIENT_MASKING_HOLDS) == 13


def test_nothing_frozen_cannot_move() -> None:
    problem = Problem()
    before = {problem.w: problem.w.detach().clone()}
    problem.train(torch.optim.AdamW(problem.params), 5)
    verify_frozen(before, {problem.w: problem.w}, {problem.w: BitMask.zeros((64, 64))})
