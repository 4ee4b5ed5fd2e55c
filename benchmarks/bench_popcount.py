"""popcount: the ones of packed bits, against the sum of bools.

python benchmarks/bench_popcount.py [--shapes default|large|COUNT] [--device cpu] [--compile] [--csv FILE]

`best eager` reads the bits too, through a table of the ones of a byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing


def case(setup: harness.Setup, n: int) -> harness.Case:
    """n bits."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        mask = torch.rand(n, device=device) < 0.5
        table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=device)
        copies = timing.rotate(ops.pack(mask), mask)

        def verify(backend: str) -> None:
            assert torch.equal(ops.popcount(copies[0][0], backend=backend), mask.sum())

        found = {
            "eager bool": lambda bits, mask: mask.sum(),
            "best eager": lambda bits, mask: table[bits.int()].sum(dtype=torch.int64),
        }
        if setup.compiled:
            found["compile"] = rivals.compiled(found["best eager"], device)  # type: ignore[assignment]
        return harness.Contest(
            verify,
            lambda backend, i: ops.popcount(copies[i % len(copies)][0], backend=backend),
            {name: rivals.in_turn(function, copies) for name, function in found.items()},
        )

    return harness.Case("popcount", torch.uint8, f"n{n}", 0.5, n // 8, prepare)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for n in shapes.counts(setup.shapes, (2**24,) if setup.device.type == "cpu" else (2**32,)):
        yield case(setup, n)


if __name__ == "__main__":
    harness.main("popcount", __doc__)
