"""Every optimizer that torch.optim has, its options, and a small problem to train on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.testing import mask, values

# Options that are either on or off, or have a telling value; each is tried where an optimizer has it.
_VALUES: dict[str, Any] = {
    "momentum": 0.9,
    "weight_decay": 0.1,
    "nesterov": True,
    "amsgrad": True,
    "centered": True,
    "maximize": True,
    "foreach": True,
    "fused": True,
    "decoupled_weight_decay": True,
    "line_search_fn": "strong_wolfe",
}
_NEEDS = {"nesterov": ("momentum",), "decoupled_weight_decay": ("weight_decay",)}
_BASE: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "Adadelta": {"lr": 10.0},
}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """All optimizers of this version of torch, by introspection."""
    return {
        name: found
        for name, found in sorted(vars(torch.optim).items())
        if isinstance(found, type)
        and issubclass(found, torch.optim.Optimizer)
        and found is not torch.optim.Optimizer
    }


def setups() -> Iterator[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]]:
    """Each optimizer plain, with each option alone, and with all numerical options together."""
    for name, cls in optimizers().items():
        if name == "SparseAdam":  # takes sparse gradients alone; test_protect.py shows it refused
            continue
        base = _BASE.get(name, {})
        known = inspect.signature(cls).parameters
        yield name, cls, base
        together = dict(base)
        for option in (o for o in _VALUES if o in known):
            needed = {o: _VALUES[o] for o in _NEEDS.get(option, ())}
            yield f"{name}-{option}", cls, {**base, **needed, option: _VALUES[option]}
            if option not in ("foreach", "fused", "maximize", "line_search_fn"):
                together[option] = _VALUES[option]
        yield f"{name}-together", cls, together


SETUPS = list(setups())
NAMES = [name for name, _, _ in SETUPS]

# The set-ups of which it is known whether zeroed gradients alone hold frozen entries: fresh, and after
# ten steps without a mask.
GRADIENT_MASKING_HOLDS: list[tuple[str, dict[str, Any], bool, bool]] = [
    ("SGD", {"lr": 0.1}, True, True),
    ("Adagrad", {}, True, True),
    ("Adadelta", {}, True, True),
    ("RMSprop", {}, True, True),
    ("Rprop", {}, True, True),
    ("Adafactor", {"lr": 1e-3}, True, True),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}, False, False),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, True, False),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, False, False),
    ("Adam", {}, True, False),
    ("Adam", {"weight_decay": 0.1}, False, False),
    ("AdamW", {}, False, False),
    ("RMSprop", {"momentum": 0.9}, True, False),
    ("NAdam", {}, True, False),
    ("RAdam", {}, True, False),
    ("Adamax", {}, True, False),
    ("ASGD", {}, False, False),
    ("LBFGS", {"lr": 0.1}, True, False),
    ("Muon", {}, False, False),
]


class Problem:
    """Two matrices, the first of them half frozen, fitted to random targets."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.w = nn.Parameter(values(64, 64, dtype=dtype) / 8)
        self.v = nn.Parameter(values(64, 16, seed=1, dtype=dtype) / 8)
        self.params = [self.w, self.v]
        self.ones = mask(64, 64, seed=2)
        self.frozen = {self.w: BitMask.from_bool(self.ones)}
        # As many targets as parameters: even LBFGS is not done within a test.
        self.x, self.y = values(320, 64, seed=3, dtype=dtype), values(320, 16, seed=4, dtype=dtype)
        # Where the forward pass does not read w: there may stand what would spoil it, NaN say.
        self.unread = torch.zeros(64, 64, dtype=torch.bool)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        w = torch.where(self.unread, 0, self.w)
        return (torch.tanh(self.x[rows] @ w) @ self.v - self.y[rows]).square().mean()

    def closure(
        self, optimizer: torch.optim.Optimizer, after_backward: Callable[[], None] | None
    ) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if after_backward is not None:
                after_backward()
            return loss

        return evaluate

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        evaluate = self.closure(optimizer, after_backward)
        for _ in range(steps):
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()

    def zero_frozen_gradients(self) -> None:
        """What people do by hand, and what does not freeze."""
        assert self.w.grad is not None
        self.w.grad.masked_fill_(self.ones, 0)
