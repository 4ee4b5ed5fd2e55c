"""masked_sgd_ on the CPU: half of 16 M entries frozen, plain and with momentum and weight decay.

python benchmarks/bench_masked_sgd_.py [--rounds 25] [--threads 2] [--csv FILE]

`eager` masks the gradient and steps, which is no freeze with momentum or weight decay; `best eager` does so
with torch's fused step; `dense` is the fused step without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import torch
from torch import Tensor

from fastmask import ops
from fastmask.testing import assert_same_bits

COUNT, SIZE = 16, 2**20


def case(momentum: float, weight_decay: float) -> harness.Case:
    """16 tensors of 1 M entries."""
    torch.manual_seed(0)
    frozen = [torch.rand(SIZE) < 0.5 for _ in range(COUNT)]
    bits = [ops.pack(one) for one in frozen]
    free = [(~one).float() for one in frozen]

    def params() -> list[Tensor]:
        draws = torch.Generator().manual_seed(1)
        found = [torch.randn(SIZE, generator=draws) for _ in range(COUNT)]
        for param in found:
            param.grad = torch.randn(SIZE, generator=draws) * 1e-3
        return found

    ours = params()
    momenta = [torch.zeros(SIZE) for _ in ours]

    def step(mine: list[Tensor], own: list[Tensor], backend: str) -> None:
        ops.masked_sgd_(
            mine, [p.grad for p in mine], own if momentum else None, bits,
            lr=1e-4, momentum=momentum, weight_decay=weight_decay, backend=backend,
        )  # fmt: skip

    def verify() -> None:
        results = []
        for backend in ("cpu", "reference"):
            mine, own = params(), [torch.zeros(SIZE) for _ in range(COUNT)]
            step(mine, own, backend)
            results.append([*mine, *own])
        for got, want in zip(*results, strict=True):
            assert_same_bits(got, want)

    def plain(masks: list[Tensor] | None, **options: bool) -> Callable[[int], None]:
        mine = params()
        optimizer = torch.optim.SGD(
            mine, lr=1e-4, momentum=momentum, weight_decay=weight_decay, **options
        )

        def once(_: int) -> None:
            for param, keep in zip(mine, masks or (), strict=False):
                param.grad *= keep
            optimizer.step()

        return once

    kept = [~one for one in frozen]
    return harness.Case(
        "masked_sgd_",
        "float32",
        f"{COUNT}x{SIZE} momentum {momentum} decay {weight_decay}",
        0.5,
        COUNT * SIZE * (20 if momentum else 12) + COUNT * SIZE // 8,
        verify,
        {
            "fastmask": lambda i: step(ours, momenta, "cpu"),
            "eager float": plain(free),
            "eager bool": plain(kept),
            "best eager": plain(free, fused=True),
            "dense": plain(None, fused=True),
        },
    )


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    yield case(0.0, 0.0)
    yield case(0.9, 1e-4)


if __name__ == "__main__":
    with torch.no_grad():
        harness.report(cases(), __doc__)
