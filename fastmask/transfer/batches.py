"""What each run draws: generators keyed by what it is, the order of rows, and the length of steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def generator(seed: int, *key: str) -> torch.Generator:
    """A CPU generator of its own for (seed, key).

    What a run draws depends on its own name alone, not on which runs came before it.
    """
    digest = hashlib.sha256("\0".join([str(seed), *key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def orders(n: int, batch: int, steps: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of `steps` batches: one permutation after another, the short rest of each left out.

    Args:
        n: rows there are.
        batch: rows of a step; all n where there are fewer.
        steps: how many batches.
        draws: decides the permutations.
    """
    size = min(batch, n)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(n, generator=draws)
        yield left[:size]
        left = left[size:]


def schedule(kind: str, step: int, steps: int) -> float:
    """Length of a step as a share of the first: 1, or `(1 + cos(pi * step / steps)) / 2`."""
    return 1.0 if kind == "constant" else (1.0 + math.cos(math.pi * step / steps)) / 2.0
