"""MaskedSGD: torch's trajectory bit for bit with nothing frozen; test_masked_optimizers.py has the rest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from masked_runs import NESTEROV, assert_same_run, name, parameters, run

from fastmask import BitMask
from fastmask.optim import MaskedSGD

OPTIONS = [
    {"momentum": mu, "dampening": damp, "weight_decay": wd, "nesterov": nesterov, "maximize": up}
    for mu, damp, wd, nesterov, up in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not nesterov or (mu and not damp)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.usefixtures("torchs_bits")
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
    optimizers = (
        MaskedSGD(parameters(), **NESTEROV),
        torch.optim.SGD(parameters(), **NESTEROV, foreach=True),
    )
    for optimizer in optimizers:
        run(optimizer, 50)
    assert_same_run(*optimizers)


def test_numbers_that_are_tensors() -> None:
    optimizers = [
        cls(parameters(), torch.tensor([0.1]), 0.9, weight_decay=torch.tensor(0.01))
        for cls in (MaskedSGD, torch.optim.SGD)
    ]
    for optimizer in optimizers:
        run(optimizer, 5)
        optimizer.param_groups[0]["lr"].fill_(0.05)
        run(optimizer, 5, start=5)
    assert_same_run(*optimizers)
