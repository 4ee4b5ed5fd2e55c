"""restore_frozen_: saved values written back into the frozen entries of a network.

python benchmarks/bench_restore_frozen_.py [--shapes resnet18,vit-b,all] [--device cpu] [--csv FILE]

`eager bool` writes by a bool index; `best eager` selects into the parameter with torch.where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, shapes, steps
from fastmask._benchmarks import rivals as others
from fastmask.testing import assert_same_bits


def case(
    setup: harness.Setup, name: str, sizes: Sequence[int], share: float, dtype: torch.dtype
) -> harness.Case:
    """One network."""

    def prepare() -> harness.Contest:
        net = steps.network(sizes, share, setup.device, dtype)
        saved = [torch.randn_like(p) for p in net.params]

        def verify(backend: str) -> None:
            params = [p.clone() for p in net.params]
            ops.restore_frozen_(params, saved, net.bits, backend=backend)
            for got, held, old, new in zip(params, net.frozen, saved, net.params, strict=True):
                assert_same_bits(got, torch.where(held, old, new))

        def every(write: object) -> object:
            assert callable(write)

            def once(_: int) -> None:
                for param, held, old in zip(net.params, net.frozen, saved, strict=True):
                    write(param, held, old)

            return once

        def index(param: Tensor, held: Tensor, old: Tensor) -> None:
            param[held] = old[held]

        def select(param: Tensor, held: Tensor, old: Tensor) -> None:
            torch.where(held, old, param, out=param)

        return harness.Contest(
            verify,
            lambda backend, i: ops.restore_frozen_(net.params, saved, net.bits, backend=backend),
            {"eager bool": every(index), "best eager": every(select)},  # type: ignore[dict-item]
        )

    entries = sum(sizes)
    moved = entries * 3 * dtype.itemsize + entries // 8
    return harness.Case(
        "restore_frozen_", dtype, f"{name} {len(sizes)}t", share, moved, prepare, traffic="update"
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
    harness.main("restore_frozen_", __doc__)
