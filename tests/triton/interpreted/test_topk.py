"""topk_mask in the interpreter: the reference's bits, whatever the digits, the programs and the ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch
from fastmask.ops.topk_mask import triton
from fastmask.testing import ADVERSARIAL_SHAPES, non_contiguous, poisoned_memory, values

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[False, True], ids=["small", "large"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits and offsets of small and of large tensors."""
    monkeypatch.setattr(triton, "SMALL", 0 if request.param else 2**22)
    monkeypatch.setattr(launch, "wide", lambda _numel: request.param)


def check(scores: Tensor, density: float) -> None:
    with poisoned_memory():
        got = ops.topk_mask(scores, density, backend="triton")
    assert torch.equal(got, ops.topk_mask(scores, density, backend="reference")), density


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*ADVERSARIAL_SHAPES, (0, 3), ()], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for density in (0.0, 0.37, 1.0):
        check(values(*shape, dtype=dtype), density)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_scores_and_ties(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    strange = [
        float("nan"),
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        1.0,
        -1.0,
        tiny,
        -tiny,
        -float("nan"),
    ]
    scores = torch.tensor(strange, dtype=dtype).repeat(11)
    for density in (0.05, 0.2, 0.4, 0.6, 0.75, 0.9):
        check(scores, density)
    check(non_contiguous(scores), 0.5)


def test_ties_across_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals are counted over blocks of a program and over the programs before it."""
    monkeypatch.setattr(triton, "BYTES", 16)
    monkeypatch.setattr(triton, "MOST", 5)
    scores = torch.randint(0, 4, (2003,), generator=torch.Generator().manual_seed(1)).float()
    for density in (0.001, 0.3, 0.5, 0.999):
        check(scores, density)
        check(torch.ones(1999), density)
