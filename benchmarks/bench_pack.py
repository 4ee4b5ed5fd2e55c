"""pack: bits of bools, and of scores above a threshold.

python benchmarks/bench_pack.py [--shapes default|large|COUNT] [--device cpu] [--compile] [--csv FILE]

`eager bool` makes bytes by a sum in torch, and of scores only the bools; `best eager` is numpy's packbits on
the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing


def shifted(mask: Tensor) -> Tensor:
    """The bits of a bool mask in plain torch."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.view(-1, 8).to(torch.uint8) << places).sum(dim=1, dtype=torch.uint8)


def case(setup: harness.Setup, n: int, dtype: torch.dtype) -> harness.Case:
    """n bools, or n scores."""
    device, bools = setup.device, dtype == torch.bool

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        mask = (
            torch.randn(n, device=device) > 0 if bools else torch.randn(n, device=device).to(dtype)
        )
        copies = timing.rotate(mask)
        mu = None if bools else 0.0

        def verify(backend: str) -> None:
            ones = (mask if bools else mask > 0).cpu().numpy()
            want = torch.zeros(-(-n // 64) * 8, dtype=torch.uint8)
            want[: -(-n // 8)] = torch.from_numpy(np.packbits(ones, bitorder="little"))
            assert torch.equal(ops.pack(mask, mu, backend=backend).cpu(), want)

        def numbered(tensor: Tensor) -> object:
            ones = tensor if bools else tensor > 0
            return np.packbits(ones.numpy(), bitorder="little")

        found = {} if bools else {"eager float": lambda t: (t > 0).float()}
        found["eager bool"] = shifted if bools else lambda t: t > 0  # type: ignore[assignment]
        if device.type == "cpu":
            found["best eager"] = numbered  # type: ignore[assignment]
        if setup.compiled and n % 8 == 0:
            whole = shifted if bools else lambda t: shifted(t > 0)
            found["compile"] = rivals.compiled(whole, device)  # type: ignore[assignment]
        if n % 8 and bools:
            del found["eager bool"]
        return harness.Contest(
            verify,
            lambda backend, i: ops.pack(copies[i % len(copies)][0], mu, backend=backend),
            {name: rivals.in_turn(function, copies) for name, function in found.items()},
        )

    return harness.Case("pack", dtype, f"n{n}", 0.5, n * dtype.itemsize + n // 8, prepare)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    floats = rivals.dtypes(setup, (torch.float32,), (torch.float32, torch.bfloat16))
    sizes = (2**24,) if setup.device.type == "cpu" else (2**28,)
    for n in shapes.counts(setup.shapes, sizes):
        for dtype in (torch.bool, *floats):
            yield case(setup, n, dtype)


if __name__ == "__main__":
    harness.main("pack", __doc__)
