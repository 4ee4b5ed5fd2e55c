"""What the back end under test promises of results that are computed, and a back end that is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.testing import assert_same_bits, assert_within_budget


def under_test() -> str:
    """The back end that `auto` takes in this test."""
    return _backend.preference(torch.get_default_device().type)[0]


def assert_as_promised(
    actual: Tensor, torchs: Tensor, exact: Tensor, where: Tensor | None = None
) -> None:
    """Torch's bits from those that keep torch's operations, the error budget from a GPU's kernels."""
    if under_test() in ("reference", "cpu"):
        assert_same_bits(actual, torchs, where=where)
        return
    kept = torch.ones_like(actual, dtype=torch.bool) if where is None else where
    assert_within_budget(actual[kept], torchs[kept], exact[kept])


def unusable() -> str:
    """A back end that takes no tensors of the default device."""
    return "cpu" if torch.get_default_device().type == "cuda" else "triton"
