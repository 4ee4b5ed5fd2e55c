"""compressed_linear: bits and kept values, against the dense product that reads every weight.

python benchmarks/bench_compressed_linear.py [--shapes NAME,...] [--device cpu] [--compile] [--csv FILE]

`eager bool` writes the values into a zero matrix by a bool mask before each product; `best eager` is torch's
sparse matrix in compressed rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing
from fastmask.testing import assert_within_budget

DENSITIES = (0.5, 0.25, 0.1)


def case(
    setup: harness.Setup, n: int, k: int, b: int, density: float, dtype: torch.dtype
) -> harness.Case:
    """W (n, k) of which this share is kept, x (b, k)."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=device).to(dtype)
        keep = torch.rand(n, k, device=device) < density
        w = torch.where(keep, torch.randn(n, k, device=device).to(dtype), 0)
        bits = ops.pack(keep)
        copies = timing.rotate(ops.compress(w, bits))
        full = timing.rotate(w)

        def verify(backend: str) -> None:
            rows = rivals.some_rows(b, device)
            got = ops.compressed_linear(x, copies[0][0], bits, n, backend=backend)[rows]
            assert_within_budget(got, F.linear(x[rows], w), x[rows].double() @ w.double().T)

        def ours(backend: str, i: int) -> Tensor:
            return ops.compressed_linear(x, copies[i % len(copies)][0], bits, n, backend=backend)

        def scattered(values: Tensor) -> Tensor:
            return F.linear(x, torch.zeros_like(w).masked_scatter_(keep, values))

        found = {
            "eager bool": rivals.in_turn(scattered, copies),
            "dense": rivals.in_turn(lambda weight: F.linear(x, weight), full),
        }
        if dtype == torch.float32:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls such matrices a beta
                rows = w.to_sparse_csr()
            found["best eager"] = lambda i: (rows @ x.T).T
        return harness.Contest(verify, ours, found)

    moved = dtype.itemsize * (int(density * n * k) + b * k + b * n) + n * k // 8
    flops = 2 * int(density * n * k) * b
    return harness.Case(
        "compressed_linear", dtype, f"N{n} K{k} B{b}", density, moved, prepare, flops, rows=b
    )


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    on_gpu = setup.device.type == "cuda"
    layers = (
        [(8192, 28672, b) for b in (1, 16)] + [(4096, 14336, b) for b in (1, 16, 64)]
        if on_gpu
        else [(4096, 4096, b) for b in (1, 8, 64)]
    )
    others = [name for name in setup.shapes if name != "default"]
    layers = layers if "default" in setup.shapes else []
    layers += list(shapes.linear(others, setup.device.type))
    for dtype in rivals.dtypes(setup, (torch.float32, torch.bfloat16), (torch.bfloat16,)):
        for n, k, b in layers:
            for density in DENSITIES:
                yield case(setup, n, k, b, density, dtype)


if __name__ == "__main__":
    harness.main("compressed_linear", __doc__)
