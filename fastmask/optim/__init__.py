"""Optimizers that leave frozen entries alone, bit for bit: masked ones, and protection for any other."""

from fastmask.optim.sgd import MaskedSGD

__all__ = ["MaskedSGD"]
