"""Runs of a masked optimizer beside torch's own, on gradients that depend on nothing but the entry."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastmask import _backend
from fastmask.optim import MaskedAdamW, MaskedSGD
from fastmask.testing import assert_same_bits, values

NESTEROV = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
AMSGRAD = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}
# The masked optimizer, torch's own, and options that keep all the state there is.
PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (MaskedSGD, torch.optim.SGD, NESTEROV),
    (MaskedAdamW, torch.optim.AdamW, AMSGRAD),
]


@contextlib.contextmanager
def reference_alone() -> Iterator[None]:
    """Let `auto` take the reference, which repeats torch's for-loops operation by operation."""
    _backend._resolve.cache_clear()
    with mock.patch.object(_backend, "preference", return_value=("reference",)):
        yield
    _backend._resolve.cache_clear()


def name(options: dict[str, Any]) -> str:
    """A test's name of the options that are on."""
    return "-".join(f"{key}{value}" for key, value in options.items() if value) or "plain"


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(values(64, 64, dtype=dtype)), nn.Parameter(values(33, 7, dtype=dtype))]


def run(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Steps on gradients of noise and a little of the entry itself."""
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                noise = values(*param.shape, seed=100 * step + i, dtype=param.dtype)
                param.grad = noise + 0.1 * param.detach()
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """State of the parameter's shape."""
    return [value for key, value in optimizer.state[param].items() if key != "step"]


def assert_same_run(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Assert that parameters and state of two optimizers are the same integers."""
    pairs = zip(
        itertools.chain.from_iterable(g["params"] for g in ours.param_groups),
        itertools.chain.from_iterable(g["params"] for g in theirs.param_groups),
        strict=True,
    )
    for mine, other in pairs:
        assert_same_bits(mine, other)
        assert ours.state[mine].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            assert_same_bits(ours.state[mine][key], value)


def entries(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_as_dense(ours: Any, dense: Any) -> None:
    """Assert that two masked optimizers hold the same bits, each in its own layout."""
    for mine, other in zip(entries(ours), entries(dense), strict=True):
        assert_same_bits(mine, other)
        assert ours.state[mine].keys() == dense.state[other].keys()
        bits = dense.frozen.get(other)
        for key, value in dense.state[other].items():
            if key != "step" and bits is not None and bits.count():
                value = value[~bits.to_bool()]
            assert_same_bits(ours.state[mine][key], value)
