"""MaskedAdamW: torch's trajectory bit for bit with nothing frozen; test_masked_optimizers.py has the rest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from masked_runs import AMSGRAD, assert_same_run, name, parameters, run

from fastmask import BitMask
from fastmask.optim import MaskedAdamW
from fastmask.testing import assert_same_bits, mask

OPTIONS = [
    {"amsgrad": largest, "weight_decay": wd, "maximize": up, "betas": betas, "eps": eps}
    for largest, wd, up, (betas, eps) in itertools.product(
        (False, True),
        (0.0, 0.1),
        (False, True),
        (((0.9, 0.999), 1e-8), ((0.0, 0.5), 1e-3)),
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.usefixtures("torchs_bits")
def test_nothing_frozen_is_torchs_trajectory(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    empty = {ours[1]: BitMask.zeros((33, 7))}
    optimizers = (
        MaskedAdamW(ours, lr=0.01, **options, frozen=empty),
        torch.optim.AdamW(theirs, lr=0.01, **options),
    )
    for optimizer in optimizers:
        run(optimizer, 50)
    assert_same_run(*optimizers)


@pytest.mark.usefixtures("torchs_bits")
def test_a_learning_rate_that_is_a_tensor() -> None:
    optimizers = (
        MaskedAdamW(parameters(), **{**AMSGRAD, "lr": torch.tensor(0.01)}),
        torch.optim.AdamW(parameters(), **{**AMSGRAD, "lr": torch.tensor(0.01)}),
    )
    for optimizer in optimizers:
        run(optimizer, 5)
        optimizer.param_groups[0]["lr"].fill_(0.005)
        run(optimizer, 5, start=5)
    assert_same_run(*optimizers)


@pytest.mark.usefixtures("torchs_bits")
def test_a_float64_default_makes_float64_counts_as_torchs() -> None:
    try:
        torch.set_default_dtype(torch.float64)
        optimizers = MaskedAdamW(parameters()), torch.optim.AdamW(parameters())
        for optimizer in optimizers:
            run(optimizer, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_run(*optimizers)


@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_options_that_hold_the_count_on_the_device_change_no_number(option: str) -> None:
    optimizers = MaskedAdamW(parameters(), **{option: True}), MaskedAdamW(parameters())
    for optimizer in optimizers:
        run(optimizer, 10)
    assert_same_run(*optimizers)


def test_a_freed_entry_takes_a_first_step_of_known_size() -> None:
    """Its moments start at 0 while the count goes on: (1 - beta1) / sqrt(1 - beta2) of lr at most."""
    params = parameters()
    bits = BitMask.from_bool(mask(64, 64))
    optimizer = MaskedAdamW(params, lr=0.01, weight_decay=0, frozen={params[0]: bits})
    run(optimizer, 500)
    optimizer.set_frozen(None)
    start = params[0].detach().clone()
    run(optimizer, 1)
    first = (params[0] - start).abs()[bits.to_bool()]
    assert 0 < first.max() <= 0.01 * 0.1 / 0.001**0.5


def test_betas_as_tensors_are_refused_by_name() -> None:
    betas = torch.tensor(0.9), torch.tensor(0.999)
    with pytest.raises(TypeError, match="betas: expected two numbers, got a tensor"):
        MaskedAdamW(parameters(), betas=betas)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
        MaskedAdamW(parameters(), lr=torch.tensor(0.1), foreach=True)
    params = parameters()
    optimizer = MaskedAdamW(params)
    optimizer.param_groups[0]["betas"] = betas
    params[0].grad = torch.ones_like(params[0])
    start = params[0].detach().clone()
    with pytest.raises(TypeError, match="beta1: expected a number, got Tensor"):
        optimizer.step()
    assert_same_bits(params[0], start)
