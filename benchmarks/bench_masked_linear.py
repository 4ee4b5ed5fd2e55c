"""masked_linear forward on the CPU: heads, vision and language layers, one row to many, one mask or eight.

python benchmarks/bench_masked_linear.py [--rounds 25] [--threads 2] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import ops
from fastmask.testing import assert_within_budget

SHAPES = ((4096, 4096), (4096, 11008), (768, 3072), (3072, 768), (7, 512), (7, 1280), (37, 1000))
ROWS = (1, 8, 64, 256)


def in_turn(
    function: Callable[..., object], copies: list[tuple[Tensor, ...]]
) -> Callable[[int], object]:
    """Call a function on the copies of its tensors, one after the other."""
    return lambda i: function(*copies[i % len(copies)])


def one_mask(n: int, k: int, b: int, dtype: torch.dtype, density: float = 0.5) -> harness.Case:
    """W (n, k), x (b, k), one mask."""
    torch.manual_seed(0)
    x, w = torch.randn(b, k).to(dtype), torch.randn(n, k).to(dtype)
    keep = torch.rand(n, k) < density
    active, factor, scratch = ops.pack(keep), keep.to(dtype), torch.empty_like(w)
    copies = harness.rotate(w)

    def masked(weight: Tensor) -> Tensor:
        return ops.masked_linear(x, weight, active, backend="cpu")

    def verify() -> None:
        selected = torch.where(keep, w, 0)
        exact = x.double() @ selected.double().T
        assert_within_budget(masked(w), F.linear(x, selected), exact)

    return harness.Case(
        "masked_linear",
        str(dtype).removeprefix("torch."),
        f"N{n} K{k} B{b}",
        density,
        w.nbytes + active.nbytes + x.nbytes + b * n * w.element_size(),
        verify,
        {
            "fastmask": in_turn(masked, copies),
            "eager float": in_turn(lambda weight: F.linear(x, weight * factor), copies),
            "eager bool": in_turn(lambda weight: F.linear(x, weight * keep), copies),
            "best eager": in_turn(
                lambda weight: F.linear(x, torch.mul(weight, factor, out=scratch)), copies
            ),
            "dense": in_turn(lambda weight: F.linear(x, weight), copies),
        },
    )


def many_masks(n: int, k: int, tasks: int, dtype: torch.dtype) -> harness.Case:
    """One row for each of several tasks, each under its own mask; eager loops, dense shares one weight."""
    torch.manual_seed(0)
    x, w = torch.randn(tasks, k).to(dtype), torch.randn(n, k).to(dtype)
    keep = torch.rand(tasks, n, k) < 0.5
    active = torch.stack([ops.pack(one) for one in keep])
    factors, scratch = keep.to(dtype), torch.empty_like(w)
    copies = harness.rotate(w)

    def masked(weight: Tensor) -> Tensor:
        return ops.masked_linear(x, weight, active, backend="cpu")

    def loop(weight: Tensor, masks: Tensor) -> Tensor:
        return torch.cat([F.linear(x[t : t + 1], weight * masks[t]) for t in range(tasks)])

    def reused(weight: Tensor) -> Tensor:
        rows = [
            F.linear(x[t : t + 1], torch.mul(weight, factors[t], out=scratch)) for t in range(tasks)
        ]
        return torch.cat(rows)

    def verify() -> None:
        exact = torch.cat(
            [x[t : t + 1].double() @ torch.where(keep[t], w, 0).double().T for t in range(tasks)]
        )
        assert_within_budget(masked(w), loop(w, keep), exact)

    return harness.Case(
        "masked_linear",
        str(dtype).removeprefix("torch."),
        f"N{n} K{k} B{tasks} S{tasks}",
        0.5,
        w.nbytes + active.nbytes + x.nbytes + tasks * n * w.element_size(),
        verify,
        {
            "fastmask": in_turn(masked, copies),
            "eager float": in_turn(lambda weight: loop(weight, factors), copies),
            "eager bool": in_turn(lambda weight: loop(weight, keep), copies),
            "best eager": in_turn(reused, copies),
            "dense": in_turn(lambda weight: F.linear(x, weight), copies),
        },
    )


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    for dtype in (torch.float32, torch.bfloat16):
        for n, k in SHAPES:
            for b in ROWS:
                yield one_mask(n, k, b, dtype)
        yield many_masks(4096, 4096, 8, dtype)
        yield many_masks(768, 3072, 8, dtype)


if __name__ == "__main__":
    with torch.no_grad():
        harness.report(cases(), __doc__)
