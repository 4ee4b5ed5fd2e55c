"""sample_mask on the CPU against the Gumbel-sigmoid as it is written in PyTorch.

python benchmarks/bench_sample_mask.py [--rounds 25] [--threads 2] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from fastmask import ops


def gumbel(logits: Tensor, samples: int) -> list[Tensor]:
    """Hard samples, straight-through: two uniform draws, as the method's origin has it."""
    found = []
    for _ in range(samples):
        noise = torch.log(torch.log(torch.rand_like(logits)) / torch.log(torch.rand_like(logits)))
        soft = torch.sigmoid(logits - noise)
        found.append((soft > 0.5).float() - soft + soft)
    return found


def case(n: int, samples: int) -> harness.Case:
    """n logits, several samples."""
    torch.manual_seed(0)
    logits = torch.randn(n)

    def verify() -> None:
        some = logits[:100_003]
        got = ops.sample_mask(some, seed=3, samples=samples, backend="cpu")
        assert torch.equal(got, ops.sample_mask(some, seed=3, samples=samples, backend="reference"))

    return harness.Case(
        "sample_mask",
        "float32",
        f"n{n} S{samples}",
        0.5,
        logits.nbytes + samples * n // 8,
        verify,
        {
            "fastmask": lambda i: ops.sample_mask(logits, seed=i, samples=samples, backend="cpu"),
            "eager float": lambda i: gumbel(logits, samples),
            "eager bool": lambda i: [
                torch.bernoulli(torch.sigmoid(logits)).bool() for _ in range(samples)
            ],
            "best eager": lambda i: [
                torch.rand_like(logits) < torch.sigmoid(logits) for _ in range(samples)
            ],
        },
    )


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    for n in (2**16, 2**22, 2**24):
        for samples in (1, 8):
            if n * samples <= 2**25:
                yield case(n, samples)


if __name__ == "__main__":
    with torch.no_grad():
        harness.report(cases(), __doc__)
