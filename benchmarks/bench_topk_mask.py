"""topk_mask on the CPU against torch's selections and sorts.

python benchmarks/bench_topk_mask.py [--rounds 25] [--threads 2] [--csv FILE]

`eager bool` scatters the indices of torch.topk; `best eager` compares with torch.kthvalue, which keeps too
few where scores are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from fastmask import ops


def scattered(scores: Tensor, k: int) -> Tensor:
    """The mask of torch.topk's indices."""
    ones = torch.zeros(scores.shape, dtype=torch.bool)
    ones[torch.topk(scores, k, sorted=False).indices] = True
    return ones


def case(n: int, density: float) -> harness.Case:
    """n normal scores."""
    torch.manual_seed(0)
    scores = torch.randn(n)
    k = int(density * n + 0.5)

    def verify() -> None:
        got = ops.topk_mask(scores, density, backend="cpu")
        assert torch.equal(got, ops.topk_mask(scores, density, backend="reference"))

    return harness.Case(
        "topk_mask",
        "float32",
        f"n{n}",
        density,
        3 * scores.nbytes + n // 8,
        verify,
        {
            "fastmask": lambda i: ops.topk_mask(scores, density, backend="cpu"),
            "eager bool": lambda i: scattered(scores, k),
            "best eager": lambda i: scores > torch.kthvalue(scores, n - k).values,
        },
    )


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    for n in (2**20, 2**24):
        for density in (0.1, 0.5):
            yield case(n, density)


if __name__ == "__main__":
    with torch.no_grad():
        harness.report(cases(), __doc__)
