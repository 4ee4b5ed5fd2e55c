"""masked_linear: heads, vision and language layers, one row to many, one mask or many, forward and step.

python benchmarks/bench_masked_linear.py [--shapes NAME,...] [--device cpu] [--compile] [--csv FILE]

Beside the sets of shapes.py: `tasks` (a mask for each of T tasks in one batch, where eager loops over them
and `merged` keeps T multiplied weights), `densities`, `training` (forward and both gradients).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing
from fastmask.testing import assert_within_budget

DENSITIES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TASKS = tuple((4096, 4096, t, rows) for t in (1, 2, 8, 16, 64) for rows in (1, 4, 16))


def moved(n: int, k: int, b: int, dtype: torch.dtype, masks: int = 1) -> int:
    """Bytes of W, bits, x and y, once each."""
    return dtype.itemsize * (n * k + b * k + b * n) + masks * n * k // 8


def one_mask(
    setup: harness.Setup, n: int, k: int, b: int, dtype: torch.dtype, density: float = 0.5
) -> harness.Case:
    """W (n, k), x (b, k), one mask."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=device).to(dtype)
        w = torch.randn(n, k, device=device).to(dtype)
        keep = torch.rand(n, k, device=device) < density
        scratch = torch.empty_like(w)
        copies = timing.rotate(w, ops.pack(keep), keep, keep.to(dtype))

        def verify(backend: str) -> None:
            got, rows = (
                ops.masked_linear(x, w, copies[0][1], backend=backend),
                rivals.some_rows(b, device),
            )
            selected = torch.where(keep, w, 0)
            exact = x[rows].double() @ selected.double().T
            assert_within_budget(got[rows], F.linear(x[rows], selected), exact)

        def ours(backend: str, i: int) -> Tensor:
            weight, bits, *_ = copies[i % len(copies)]
            return ops.masked_linear(x, weight, bits, backend=backend)

        def layer(weight: Tensor) -> nn.Module:
            return rivals.pruned(lambda: nn.Linear(1, 1, bias=False), weight, keep)

        layers = [(layer(weight),) for weight, *_ in copies]
        found = {
            "eager float": lambda weight, bits, keep, factor: F.linear(x, weight * factor),
            "eager bool": lambda weight, bits, keep, factor: F.linear(x, weight * keep),
            "best eager": lambda weight, bits, keep, factor: F.linear(
                x, torch.mul(weight, factor, out=scratch)
            ),
            "dense": lambda weight, bits, keep, factor: F.linear(x, weight),
        }
        if setup.compiled:
            found["compile"] = rivals.compiled(
                lambda weight, bits, keep, factor: F.linear(x, weight * factor), device
            )
            if k % 8 == 0:
                found["compile packed"] = rivals.compiled(
                    lambda weight, bits, keep, factor: F.linear(x, rivals.unpacked(weight, bits)),
                    device,
                )
        return harness.Contest(
            verify,
            ours,
            {
                **{name: rivals.in_turn(function, copies) for name, function in found.items()},
                "prune": rivals.in_turn(lambda layer: layer(x), layers),
            },
        )

    shape, flops = f"N{n} K{k} B{b}", 2 * n * k * b
    return harness.Case(
        "masked_linear", dtype, shape, density, moved(n, k, b, dtype), prepare, flops, rows=b
    )


def many_masks(
    setup: harness.Setup, n: int, k: int, tasks: int, rows: int, dtype: torch.dtype
) -> harness.Case:
    """Some rows for each of several tasks, each under its own mask."""
    device, b = setup.device, tasks * rows

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=device).to(dtype)
        w = torch.randn(n, k, device=device).to(dtype)
        keep = torch.rand(tasks, n, k, device=device) < 0.5
        active = torch.stack([ops.pack(one) for one in keep])
        factors, scratch = keep.to(dtype), torch.empty_like(w)
        merged = w * factors
        copies = timing.rotate(w)

        def each(product: object) -> Tensor:
            assert callable(product)
            return torch.cat([F.linear(part, product(t)) for t, part in enumerate(x.split(rows))])

        def verify(backend: str) -> None:
            selected = torch.where(keep, w, 0)
            exact = torch.cat(
                [
                    part.double() @ one.double().T
                    for part, one in zip(x.split(rows), selected, strict=True)
                ]
            )
            got = ops.masked_linear(x, w, active, backend=backend)
            assert_within_budget(got, each(lambda t: selected[t]), exact)

        def ours(backend: str, i: int) -> Tensor:
            return ops.masked_linear(x, copies[i % len(copies)][0], active, backend=backend)

        found = {
            "eager float": lambda weight: each(lambda t: weight * factors[t]),
            "eager bool": lambda weight: each(lambda t: weight * keep[t]),
            "best eager": lambda weight: each(lambda t: torch.mul(weight, factors[t], out=scratch)),
            "merged": lambda weight: torch.bmm(x.view(tasks, rows, k), merged.mT),
            "dense": lambda weight: F.linear(x, weight),
        }
        if setup.compiled:
            found["compile"] = rivals.compiled(
                lambda weight: torch.bmm(x.view(tasks, rows, k), (weight * factors).mT), device
            )
        return harness.Contest(
            verify, ours, {name: rivals.in_turn(f, copies) for name, f in found.items()}
        )

    shape, flops = f"N{n} K{k} B{b} S{tasks}", 2 * n * k * b
    return harness.Case(
        "masked_linear", dtype, shape, 0.5, moved(n, k, b, dtype, tasks), prepare, flops, rows=rows
    )


def training(setup: harness.Setup, n: int, k: int, b: int, dtype: torch.dtype) -> harness.Case:
    """Forward and the gradients of x and W."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=device).to(dtype).requires_grad_()
        w = torch.randn(n, k, device=device).to(dtype).requires_grad_()
        dy = torch.randn(b, n, device=device).to(dtype)
        keep = torch.rand(n, k, device=device) < 0.5
        bits, factor = ops.pack(keep), keep.to(dtype)

        def step(y: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, w), dy)

        def verify(backend: str) -> None:
            got = step(ops.masked_linear(x, w, bits, backend=backend))
            selected = torch.where(keep, w, 0).detach()
            plain = (dy @ selected, torch.where(keep, dy.T @ x, 0))
            exact = (
                dy.double() @ selected.double(),
                torch.where(keep, dy.double().T @ x.double(), 0),
            )
            for ours, other, true in zip(got, plain, exact, strict=True):
                assert_within_budget(ours, other.detach(), true.detach())

        product = lambda: F.linear(x, w * factor)  # noqa: E731
        compiled = rivals.compiled(product, device) if setup.compiled else None
        return harness.Contest(
            verify,
            lambda backend, i: step(ops.masked_linear(x, w, bits, backend=backend)),
            {
                "eager float": lambda i: step(product()),
                "eager bool": lambda i: step(F.linear(x, w * keep)),
                "dense": lambda i: step(F.linear(x, w)),
                **({"compile": lambda i: step(compiled())} if compiled else {}),  # type: ignore[arg-type]
            },
            grad=True,
        )

    # W and its bits forward and for dx, dW written, its bits read; x twice, y, dy twice, dx.
    bytes_moved = dtype.itemsize * (3 * n * k + 3 * b * k + 3 * b * n) + 3 * n * k // 8
    return harness.Case(
        "masked_linear",
        dtype,
        f"N{n} K{k} B{b} step",
        0.5,
        bytes_moved,
        prepare,
        6 * n * k * b,
        rows=b,
    )


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    own = ("tasks", "densities", "training")
    on_gpu = setup.device.type == "cuda"
    for dtype in rivals.dtypes(
        setup, (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)
    ):
        for name in setup.shapes:
            if name not in own:
                for n, k, b in shapes.linear((name,), setup.device.type):
                    yield one_mask(setup, n, k, b, dtype)
            if name == "default":
                yield many_masks(setup, 4096, 4096, 8, 1, dtype)
                if on_gpu:
                    yield many_masks(setup, 4096, 4096, 64, 1, dtype)
                yield training(setup, 4096, 4096, 256, dtype)
            if name == "tiny":
                yield many_masks(setup, 37, 45, 3, 2, dtype)
                yield training(setup, 37, 45, 6, dtype)
            if name in ("tasks", "all"):
                for n, k, tasks, rows in TASKS:
                    yield many_masks(setup, n, k, tasks, rows, dtype)
            if name in ("densities", "all"):
                for density in DENSITIES:
                    for b in (1, 64):
                        yield one_mask(setup, 4096, 4096, b, dtype, density)
            if name in ("training", "all"):
                for b in (8, 64, 256, 1024):
                    yield training(setup, 4096, 4096, b, dtype)


if __name__ == "__main__":
    harness.main("masked_linear", __doc__)
