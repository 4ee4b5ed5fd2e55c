"""masked_weights: the masked weights of all layers of a network at once, as `fastmask.nn.prepared` has them.

python benchmarks/bench_masked_weights.py [--shapes resnet18,vit-b,all] [--device cpu] [--csv FILE]

`best eager` is torch's one call for all products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.testing import assert_same_bits


def case(setup: harness.Setup, name: str, sizes: Sequence[int], dtype: torch.dtype) -> harness.Case:
    """One network, half of its weights active."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        weights = [torch.randn(n, device=device).to(dtype) for n in sizes]
        masks = [torch.rand(n, device=device) < 0.5 for n in sizes]
        bits, factors = [ops.pack(m) for m in masks], [m.to(dtype) for m in masks]

        def verify(backend: str) -> None:
            chosen = ops.masked_weights(weights, bits, backend=backend)
            for one, w, m in zip(chosen, weights, masks, strict=True):
                assert_same_bits(one, torch.where(m, w, 0))

        pairs = list(zip(weights, factors, masks, strict=True))
        found = {
            "eager float": lambda _: [w * factor for w, factor, _ in pairs],
            "eager bool": lambda _: [w * keep for w, _, keep in pairs],
            "best eager": lambda _: torch._foreach_mul(weights, factors),
        }
        return harness.Contest(
            verify, lambda backend, _: ops.masked_weights(weights, bits, backend=backend), found
        )

    entries = sum(sizes)
    moved = entries * 2 * dtype.itemsize + entries // 8
    shape = f"{name} {len(sizes)}t"
    return harness.Case("masked_weights", dtype, shape, 0.5, moved, prepare, traffic="copy")


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.float32, torch.bfloat16)):
        for name, sizes in shapes.parameters(setup.shapes, ("resnet18", "resnet50")):
            yield case(setup, name, sizes, dtype)


if __name__ == "__main__":
    harness.main("masked_weights", __doc__)
