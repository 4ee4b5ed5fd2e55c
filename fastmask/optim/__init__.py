"""Optimizers that leave frozen entries alone, bit for bit: masked ones, and protection for any other."""

from fastmask.optim.adamw import MaskedAdamW
from fastmask.optim.protect import Protection, protect
from fastmask.optim.sgd import MaskedSGD
from fastmask.optim.step_in_backward import SGDInBackward, step_in_backward
from fastmask.optim.verify import verify_frozen

__all__ = [
    "MaskedAdamW",
    "MaskedSGD",
    "Protection",
    "SGDInBackward",
    "protect",
    "step_in_backward",
    "verify_frozen",
]
