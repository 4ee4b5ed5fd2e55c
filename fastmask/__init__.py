"""fastmask: one-bit masks over the weights of a pretrained network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmask import backbones, data, errors, masks, nn, ops, optim
    from fastmask.bits import BitMask
    from fastmask.masks import FixedMask, GumbelMask, ThresholdMask, TopKMask
    from fastmask.nn import (
        MaskedConv2d,
        MaskedLinear,
        MaskedMultiheadAttention,
        bake_,
        mask_,
        plain_state_dict,
        set_batch_norm_policy,
        unmask_,
    )
    from fastmask.optim.protect import protect
    from fastmask.optim.verify import verify_frozen

__version__ = "0.1.0"

__all__ = [
    "BitMask",
    "FixedMask",
    "GumbelMask",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedMultiheadAttention",
    "ThresholdMask",
    "TopKMask",
    "backbones",
    "bake_",
    "data",
    "errors",
    "mask_",
    "masks",
    "nn",
    "ops",
    "optim",
    "plain_state_dict",
    "protect",
    "set_batch_norm_policy",
    "unmask_",
    "verify_frozen",
]

# Where a public name lives; a room is itself. They are loaded when first used, so that the command line
# starts without torch, and `fastmask info` can say what is wrong where torch cannot be imported.
_HOMES = {
    "BitMask": "fastmask.bits",
    "FixedMask": "fastmask.masks",
    "GumbelMask": "fastmask.masks",
    "MaskedConv2d": "fastmask.nn",
    "MaskedLinear": "fastmask.nn",
    "MaskedMultiheadAttention": "fastmask.nn",
    "ThresholdMask": "fastmask.masks",
    "TopKMask": "fastmask.masks",
    "bake_": "fastmask.nn",
    "mask_": "fastmask.nn",
    "plain_state_dict": "fastmask.nn",
    "protect": "fastmask.optim.protect",
    "set_batch_norm_policy": "fastmask.nn",
    "unmask_": "fastmask.nn",
    "verify_frozen": "fastmask.optim.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastmask' has no attribute {name!r}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    return importlib.import_module(f"fastmask.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
