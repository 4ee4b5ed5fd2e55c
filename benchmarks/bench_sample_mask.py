"""sample_mask against the Gumbel-sigmoid as it is written in PyTorch.

python benchmarks/bench_sample_mask.py [--shapes default|large|COUNT] [--device cpu] [--compile] [--csv FILE]

`eager float` draws twice, as the method's origin does; `eager bool` is torch.bernoulli; `best eager` compares
one uniform draw.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing


def case(setup: harness.Setup, n: int, samples: int, dtype: torch.dtype) -> harness.Case:
    """n logits, several samples."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        logits = torch.randn(n, device=device).to(dtype)
        copies = timing.rotate(logits)

        def verify(backend: str) -> None:
            some = logits[: min(n, 100_003)]
            got = ops.sample_mask(some, seed=3, samples=samples, backend=backend)
            # The same seed gives the same bits on every device.
            want = ops.sample_mask(some.cpu(), seed=3, samples=samples, backend="reference")
            assert torch.equal(got.cpu(), want)

        def ours(backend: str, i: int) -> Tensor:
            return ops.sample_mask(
                copies[i % len(copies)][0], seed=i, samples=samples, backend=backend
            )

        def drawn(logits: Tensor) -> list[Tensor]:
            return [torch.bernoulli(torch.sigmoid(logits)).bool() for _ in range(samples)]

        found = {
            "eager float": lambda t: [rivals.gumbel(t) for _ in range(samples)],
            "eager bool": drawn,
            "best eager": lambda t: [torch.rand_like(t) < torch.sigmoid(t) for _ in range(samples)],
        }
        if setup.compiled:
            found["compile"] = rivals.compiled(found["eager float"], device)  # type: ignore[assignment]
        return harness.Contest(
            verify, ours, {name: rivals.in_turn(f, copies) for name, f in found.items()}
        )

    moved = n * dtype.itemsize + samples * n // 8
    return harness.Case("sample_mask", dtype, f"n{n} S{samples}", 0.5, moved, prepare)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    sizes = (2**16, 2**22, 2**24) if setup.device.type == "cpu" else (2**24, 2**26)
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.float32,)):
        for n in shapes.counts(setup.shapes, sizes):
            for samples in (1, 8):
                if n * samples <= 2**25 or setup.device.type != "cpu":
                    yield case(setup, n, samples, dtype)


if __name__ == "__main__":
    harness.main("sample_mask", __doc__)
