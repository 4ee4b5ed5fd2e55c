"""Layers that read their weight through a mask, in the place of torch's own."""

from fastmask.nn.conv import MaskedConv2d
from fastmask.nn.convert import Conversion, bake_, mask_, plain_state_dict, unmask_
from fastmask.nn.linear import MaskedLinear

__all__ = [
    "Conversion",
    "MaskedConv2d",
    "MaskedLinear",
    "bake_",
    "mask_",
    "plain_state_dict",
    "unmask_",
]
