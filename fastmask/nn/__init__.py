"""Layers that read their weight through a mask, in the place of torch's own."""

from fastmask.nn.conv import MaskedConv2d
from fastmask.nn.convert import plain_state_dict
from fastmask.nn.linear import MaskedLinear

__all__ = ["MaskedConv2d", "MaskedLinear", "plain_state_dict"]
