"""pack, unpack and popcount on the CPU against torch on bools.

python benchmarks/bench_pack.py [--rounds 25] [--threads 2] [--csv FILE]

`best eager` is numpy's packbits, and for popcount a table of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import numpy as np
import torch
from torch import Tensor

from fastmask import ops


def shifted(mask: Tensor) -> Tensor:
    """The bits of a bool mask in plain torch."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (mask.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    torch.manual_seed(0)
    n = 2**24
    scores = torch.randn(n)
    mask = scores > 0
    bits, array = ops.pack(mask, backend="cpu"), mask.numpy()
    ones = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8)

    def equal(got: Tensor, want: Tensor) -> None:
        assert torch.equal(got, want)

    yield harness.Case(
        "pack", "bool", f"n{n}", 0.5, n + n // 8, lambda: equal(bits, shifted(mask)),
        {
            "fastmask": lambda i: ops.pack(mask, backend="cpu"),
            "eager bool": lambda i: shifted(mask),
            "best eager": lambda i: np.packbits(array, bitorder="little"),
        },
    )  # fmt: skip
    yield harness.Case(
        "pack", "float32", f"n{n}", 0.5, scores.nbytes + n // 8,
        lambda: equal(ops.pack(scores, 0.0, backend="cpu"), bits),
        {
            "fastmask": lambda i: ops.pack(scores, 0.0, backend="cpu"),
            "eager float": lambda i: (scores > 0).float(),
            "eager bool": lambda i: scores > 0,
            "best eager": lambda i: np.packbits((scores > 0).numpy(), bitorder="little"),
        },
    )  # fmt: skip
    yield harness.Case(
        "unpack", "bool", f"n{n}", 0.5, n + n // 8,
        lambda: equal(ops.unpack(bits, (n,), backend="cpu"), mask),
        {
            "fastmask": lambda i: ops.unpack(bits, (n,), backend="cpu"),
            "eager bool": lambda i: ops.unpack(bits, (n,), backend="reference"),
            "best eager": lambda i: np.unpackbits(bits.numpy(), bitorder="little"),
        },
    )  # fmt: skip
    yield harness.Case(
        "popcount", "bool", f"n{n}", 0.5, n // 8,
        lambda: equal(ops.popcount(bits, backend="cpu"), mask.sum()),
        {
            "fastmask": lambda i: ops.popcount(bits, backend="cpu"),
            "eager bool": lambda i: mask.sum(),
            "best eager": lambda i: ones[bits.int()].sum(dtype=torch.int64),
        },
    )  # fmt: skip


if __name__ == "__main__":
    with torch.no_grad():
        harness.report(cases(), __doc__)
