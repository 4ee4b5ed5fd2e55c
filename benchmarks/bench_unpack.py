"""unpack: bools of bits.

python benchmarks/bench_unpack.py [--shapes default|large|COUNT] [--device cpu] [--compile] [--csv FILE]

`eager bool` shifts in torch; `best eager` is numpy's unpackbits on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing


def shifted(bits: Tensor) -> Tensor:
    """The bools of bits in plain torch."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts & 1).bool().flatten()


def case(setup: harness.Setup, n: int) -> harness.Case:
    """n bits."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        mask = torch.rand(n, device=device) < 0.5
        copies = timing.rotate(ops.pack(mask))

        def verify(backend: str) -> None:
            assert torch.equal(ops.unpack(copies[0][0], (n,), backend=backend), mask)

        found = {"eager bool": shifted}
        if device.type == "cpu":
            found["best eager"] = lambda bits: np.unpackbits(bits.numpy(), bitorder="little")  # type: ignore[assignment,return-value]
        if setup.compiled:
            found["compile"] = rivals.compiled(shifted, device)  # type: ignore[assignment]
        return harness.Contest(
            verify,
            lambda backend, i: ops.unpack(copies[i % len(copies)][0], (n,), backend=backend),
            {name: rivals.in_turn(function, copies) for name, function in found.items()},
        )

    return harness.Case("unpack", torch.bool, f"n{n}", 0.5, n + n // 8, prepare, traffic="copy")


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for n in shapes.counts(setup.shapes, (2**24,) if setup.device.type == "cpu" else (2**28,)):
        yield case(setup, n)


if __name__ == "__main__":
    harness.main("unpack", __doc__)
