"""topk_mask against torch's selections and sorts.

python benchmarks/bench_topk_mask.py [--shapes default|large|COUNT] [--device cpu] [--compile] [--csv FILE]

`eager bool` scatters the indices of torch.topk; `best eager` compares with torch.kthvalue, which keeps too
few where scores are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing


def case(setup: harness.Setup, n: int, density: float, dtype: torch.dtype) -> harness.Case:
    """n normal scores."""
    device, k = setup.device, int(density * n + 0.5)

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        copies = timing.rotate(torch.randn(n, device=device).to(dtype))

        def verify(backend: str) -> None:
            scores = copies[0][0]
            got = ops.topk_mask(scores, density, backend=backend)
            assert torch.equal(got, ops.topk_mask(scores, density, backend="reference"))

        def scattered(scores: Tensor) -> Tensor:
            ones = torch.zeros(scores.shape, dtype=torch.bool, device=device)
            ones[torch.topk(scores, k, sorted=False).indices] = True
            return ones

        found = {
            "eager bool": scattered,
            "best eager": lambda scores: scores > torch.kthvalue(scores, n - k).values,
        }
        return harness.Contest(
            verify,
            lambda backend, i: ops.topk_mask(copies[i % len(copies)][0], density, backend=backend),
            {name: rivals.in_turn(function, copies) for name, function in found.items()},
        )

    # A radix selection reads the scores three times.
    moved = 3 * n * dtype.itemsize + n // 8
    return harness.Case("topk_mask", dtype, f"n{n}", density, moved, prepare)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    sizes = (2**20, 2**24) if setup.device.type == "cpu" else (2**24, 45_000_000)
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.float32,)):
        for n in shapes.counts(setup.shapes, sizes):
            for density in (0.1, 0.5):
                yield case(setup, n, density, dtype)


if __name__ == "__main__":
    harness.main("topk_mask", __doc__)
