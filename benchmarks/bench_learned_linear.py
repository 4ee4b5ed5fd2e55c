"""learned_linear: draw, forward and backward of a layer whose mask is learned.

python benchmarks/bench_learned_linear.py [--shapes NAME,...] [--device cpu] [--compile] [--csv FILE]

`eager float` is the Gumbel-sigmoid, straight-through, as it is written in PyTorch; with S samples a batch as
the method's origin has them, two uniform tensors, S copies of the weight and `bmm`. `best eager` compares one
uniform draw and lets the gradient pass, one sample after the other; `dense` trains the weight itself.
Beside the sets of shapes.py: `methods` (scores by threshold and top-k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.testing import assert_within_budget

_CPU = [(n, k, b, 1) for n, k in ((4096, 4096), (768, 3072), (7, 1280)) for b in (8, 64, 256)]
_GPU = [
    (n, k, b, 1) for n, k in ((4096, 4096), (768, 3072), (7, 1280)) for b in (64, 256, 1024, 4096)
]
FOUR = (4096, 4096, 64, 4)


def threshold(scores: Tensor) -> Tensor:
    """`scores > 0` with the gradient of the identity."""
    return (scores > 0).float() - scores.detach() + scores


def topk(scores: Tensor) -> Tensor:
    """The larger half, by the value of rank k, with the gradient of the identity."""
    flat = scores.detach().flatten()
    least = torch.kthvalue(flat, flat.numel() - flat.numel() // 2 + 1).values
    return (scores >= least).float() - scores.detach() + scores


def case(
    setup: harness.Setup, n: int, k: int, b: int, samples: int, dtype: torch.dtype, method: str
) -> harness.Case:
    """W (n, k), x (b, k), one sample or several a step."""
    device = setup.device
    options: dict[str, Any] = {
        "gumbel": {"samples": samples},
        "threshold": {"method": "threshold"},
        "topk": {"method": "topk", "density": 0.5},
    }[method]

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=device).to(dtype).requires_grad_()
        w = torch.randn(n, k, device=device).to(dtype)
        dy = torch.randn(b, n, device=device).to(dtype)
        scores = torch.randn(n, k, device=device).requires_grad_()
        trained = w.clone().requires_grad_()

        def gradients(
            kind: torch.dtype, backend: str, seed: int, among: torch.dtype = torch.float32
        ) -> tuple[Tensor, ...]:
            rows, learned = (
                t.detach().to(d).requires_grad_() for t, d in ((x, kind), (scores, among))
            )
            seeded = {"seed": seed} if method == "gumbel" else {}
            y = ops.learned_linear(rows, w.to(kind), learned, **options, **seeded, backend=backend)
            return y.detach(), *torch.autograd.grad(y, (rows, learned), dy.to(kind))

        def verify(backend: str) -> None:
            exact = gradients(torch.float64, "reference", 3, torch.float64)
            plain = gradients(dtype, "reference", 3)
            for got, other, true in zip(gradients(dtype, backend, 3), plain, exact, strict=True):
                assert_within_budget(got, other, true)

        def ours(backend: str, i: int) -> object:
            seeded = {"seed": i} if method == "gumbel" else {}
            y = ops.learned_linear(x, w, scores, **options, **seeded, backend=backend)
            return torch.autograd.grad(y, (x, scores), dy)

        def step(output: Callable[[], Tensor], leaf: Tensor) -> Callable[[int], object]:
            return lambda i: torch.autograd.grad(output(), (x, leaf), dy)

        def origin() -> Tensor:
            masks = hard(scores.expand(samples, n, k)) if samples > 1 else hard(scores)
            weight = w * masks.to(dtype)
            if samples == 1:
                return F.linear(x, weight)
            return torch.bmm(x.view(samples, -1, k), weight.mT).reshape(b, n)

        def frugal() -> Tensor:
            parts = x.split(b // samples)
            return torch.cat(
                [F.linear(part, w * rivals.passing(scores).to(dtype)) for part in parts]
            )

        hard = {"gumbel": rivals.gumbel, "threshold": threshold, "topk": topk}[method]
        found = {
            "eager float": step(origin, scores),
            "dense": step(lambda: F.linear(x, trained), trained),
        }
        if method == "gumbel":
            found["best eager"] = step(frugal, scores)
        if setup.compiled and method != "topk":
            compiled = rivals.compiled(origin, device)
            found["compile"] = step(compiled, scores)  # type: ignore[arg-type]
        return harness.Contest(verify, ours, found, grad=True)

    # W and scores forward, W again for dx and for the scores' gradient, which is written; bits and rows.
    weights = n * k * (3 * dtype.itemsize + 2 * 4 + (4 if method == "gumbel" else 0))
    shape = f"N{n} K{k} B{b}" + (f" S{samples}" if samples > 1 else "")
    shape += "" if method == "gumbel" else f" {method}"
    return harness.Case(
        "learned_linear", dtype, shape, 0.5, weights + dtype.itemsize * b * (3 * k + 3 * n), prepare,
        6 * n * k * b,
    )  # fmt: skip


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    on_gpu = setup.device.type == "cuda"
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.bfloat16, torch.float32)):
        for name in setup.shapes:
            if name in ("default", "all"):
                for n, k, b, samples in (FOUR, *(_GPU if on_gpu else _CPU)):
                    yield case(setup, n, k, b, samples, dtype, "gumbel")
            if name in ("methods", "all"):
                for method in ("threshold", "topk"):
                    for b in (64, 256):
                        yield case(setup, 4096, 4096, b, 1, dtype, method)
            if name == "tiny":
                for method, samples in (
                    ("gumbel", 1),
                    ("gumbel", 3),
                    ("threshold", 1),
                    ("topk", 1),
                ):
                    yield case(setup, 37, 45, 6, samples, dtype, method)
            elif name not in ("default", "methods", "all"):
                for n, k, b in shapes.linear((name,), setup.device.type):
                    yield case(setup, n, k, b, 1, dtype, "gumbel")


if __name__ == "__main__":
    harness.main("learned_linear", __doc__)
