"""masked_sgd_: the parameters of a network, half of them frozen, plain and with momentum and weight decay.

python benchmarks/bench_masked_sgd_.py [--shapes resnet18,vit-b,all] [--device cpu] [--csv FILE]

`eager` masks the gradients and steps, which is no freeze with momentum or weight decay; `best eager` does so
with torch's fused step; `save restore` is an exact freeze around the fused step; `dense` is that step alone.
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
    setup: harness.Setup,
    name: str,
    sizes: Sequence[int],
    share: float,
    momentum: float,
    dtype: torch.dtype,
) -> harness.Case:
    """One network, one optimizer's settings."""
    weight_decay = 1e-4 if momentum else 0.0

    def prepare() -> harness.Contest:
        net = steps.network(sizes, share, setup.device, dtype)
        momenta = [[torch.zeros_like(p) for p in net.params]] if momentum else []

        def step(params: list[Tensor], states: list[list[Tensor]], backend: str) -> None:
            ops.masked_sgd_(
                params, [p.grad for p in params], states[0] if states else None, net.bits,
                lr=1e-4, momentum=momentum, weight_decay=weight_decay, backend=backend,
            )  # fmt: skip

        sgd = functools.partial(
            torch.optim.SGD, lr=1e-4, momentum=momentum, weight_decay=weight_decay
        )
        return harness.Contest(
            lambda backend: steps.check(net, momenta, step, backend),
            lambda backend, i: step(net.params, momenta, backend),
            steps.rivals(net, sgd),
        )

    count, entries = len(sizes), sum(sizes)
    moved = entries * (5 if momentum else 3) * dtype.itemsize + entries // 8
    shape = f"{name} {count}t momentum {momentum} decay {weight_decay}"
    return harness.Case("masked_sgd_", dtype, shape, share, moved, prepare, traffic="update")


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    default = ("flat-16m", "resnet50") if setup.device.type == "cpu" else ("resnet50", "vit-b")
    shares = steps.SHARES if "all" in setup.shapes else (0.5,)
    for dtype in others.dtypes(setup, (torch.float32,), (torch.float32,)):
        for name, sizes in shapes.parameters(setup.shapes, default):
            for momentum in (0.0, 0.9):
                for share in shares:
                    yield case(setup, name, sizes, share, momentum, dtype)


if __name__ == "__main__":
    harness.main("masked_sgd_", __doc__)
