"""Layers that read their weight through a mask, in the place of torch's own."""

from fastmask.nn.attention import MaskedMultiheadAttention
from fastmask.nn.batch_norm import (
    BatchNormRecord,
    batch_norm_state_dict,
    load_batch_norm_state_dict,
    set_batch_norm_policy,
)
from fastmask.nn.conv import MaskedConv2d
from fastmask.nn.convert import Conversion, bake_, mask_, plain_state_dict, unmask_
from fastmask.nn.linear import MaskedLinear
from fastmask.nn.prepare import prepared

__all__ = [
    "BatchNormRecord",
    "Conversion",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedMultiheadAttention",
    "bake_",
    "batch_norm_state_dict",
    "load_batch_norm_state_dict",
    "mask_",
    "plain_state_dict",
    "prepared",
    "set_batch_norm_policy",
    "unmask_",
]
