"""masked_adamw_: the parameters of a network, half of them frozen.

python benchmarks/bench_masked_adamw_.py [--shapes resnet18,vit-b,all] [--device cpu] [--csv FILE]

`eager` masks the gradients and steps, which is no freeze: moments and weight decay move frozen weights;
`best eager` does so with torch's fused step; `save restore` is an exact freeze around the fused step;
`dense` is that step alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, shapes, steps
from fastmask._benchmarks import rivals as others


def case(
    setup: harness.Setup, name: str, sizes: Sequence[int], share: float, dtype: torch.dtype
) -> harness.Case:
    """One network."""
    device = setup.device

    def prepare() -> harness.Contest:
        net = steps.network(sizes, share, device, dtype)
        moments = [[torch.zeros_like(p) for p in net.params] for _ in range(2)]
        counts = [torch.zeros((), device=device) for _ in net.params]

        def step(params: list[Tensor], states: list[list[Tensor]], backend: str) -> None:
            first, second, steps_taken = states
            ops.masked_adamw_(
                params, [p.grad for p in params], first, second, None, steps_taken, net.bits,
                lr=1e-4, weight_decay=0.01, backend=backend,
            )  # fmt: skip

        adamw = functools.partial(
            torch.optim.AdamW, lr=1e-4, weight_decay=0.01, capturable=device.type == "cuda"
        )
        states = [*moments, counts]
        return harness.Contest(
            lambda backend: steps.check(net, states, step, backend),
            lambda backend, i: step(net.params, states, backend),
            steps.rivals(net, adamw),
        )

    count, entries = len(sizes), sum(sizes)
    moved = entries * 7 * dtype.itemsize + entries // 8
    return harness.Case(
        "masked_adamw_", dtype, f"{name} {count}t", share, moved, prepare, traffic="update"
    )


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    default = ("flat-16m", "resnet50") if setup.device.type == "cpu" else ("resnet50", "vit-b")
    shares = steps.SHARES if "all" in setup.shapes else (0.5,)
    for dtype in others.dtypes(setup, (torch.float32,), (torch.float32,)):
        for name, sizes in shapes.parameters(setup.shapes, default):
            for share in shares:
                yield case(setup, name, sizes, share, dtype)


if __name__ == "__main__":
    harness.main("masked_adamw_", __doc__)
