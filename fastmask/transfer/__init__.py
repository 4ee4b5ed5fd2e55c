"""Domain transfer (arXiv 2308.13957): freeze the weights a source domain needs, then learn a target."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmask.transfer.config import Config
    from fastmask.transfer.mask_files import recall
    from fastmask.transfer.strategies import MaskWarning
    from fastmask.transfer.sweep import Result, run

__all__ = ["Config", "MaskWarning", "Result", "recall", "run"]

# Loaded when first used: `fastmask transfer --help` asks Config for its defaults and needs no torch.
_HOMES = {
    "Config": "fastmask.transfer.config",
    "MaskWarning": "fastmask.transfer.strategies",
    "Result": "fastmask.transfer.sweep",
    "recall": "fastmask.transfer.mask_files",
    "run": "fastmask.transfer.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmask.transfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
