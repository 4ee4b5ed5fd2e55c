"""The calls whose kernels are compiled ahead of time: each op in each dtype and path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An op, what tells the case apart, and a launcher with its arguments on the CPU."""

    op: str
    what: str
    launcher: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.what}"


def cases() -> list[Case]:
    """Every case, op by op."""
    return [*_bits()]


def _bits() -> Iterator[Case]:
    n = 4096
    yield Case("pack", "bool", "pack", (torch.zeros(n, dtype=torch.bool), 0.0))
    yield Case("unpack", "bool", "unpack", (_bytes(n), n))
    yield Case("popcount", "words", "popcount", (_bytes(n),))
    for dtype in FLOATS:
        scores = torch.zeros(n, dtype=dtype)
        yield Case("pack", _name(dtype), "pack", (scores, 0.5))
        sampled = (scores, torch.tensor(3), 8, 5)
        yield Case("sample_mask", _name(dtype), "sample_mask", sampled)


def _bytes(numel: int) -> Tensor:
    return torch.zeros(numel // 8, dtype=torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
