"""learned_linear on the CPU: draw, forward and backward of a layer whose mask is learned.

python benchmarks/bench_learned_linear.py [--rounds 25] [--threads 2] [--csv FILE]

`eager float` is the Gumbel-sigmoid, straight-through, as it is written in PyTorch; `best eager` thresholds
one uniform draw instead of two and lets the gradient pass; `dense` trains the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import ops
from fastmask.testing import assert_within_budget


def gumbel(logits: Tensor) -> Tensor:
    """A hard sample with the gradient of the soft one."""
    noise = torch.log(torch.log(torch.rand_like(logits)) / torch.log(torch.rand_like(logits)))
    soft = torch.sigmoid(logits - noise)
    return (soft > 0.5).float() - soft.detach() + soft


def passing(logits: Tensor) -> Tensor:
    """A sample with one uniform draw and the gradient of the sigmoid."""
    soft = torch.sigmoid(logits)
    return (torch.rand_like(soft) < soft).float() - soft.detach() + soft


def case(n: int, k: int, b: int) -> harness.Case:
    """W (n, k), x (b, k), one sample a step."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(b, k).requires_grad_(), torch.randn(n, k), torch.randn(b, n)
    logits, trained = torch.randn(n, k).requires_grad_(), w.clone().requires_grad_()

    def step(output: Callable[[int], Tensor], leaf: Tensor) -> Callable[[int], object]:
        return lambda i: torch.autograd.grad(output(i), (x, leaf), dy)

    def ours(i: int, backend: str = "cpu") -> Tensor:
        return ops.learned_linear(x, w, logits, seed=i, backend=backend)

    def verify() -> None:
        exact = ops.learned_linear(x.double(), w.double(), logits, seed=3, backend="reference")
        assert_within_budget(ours(3).detach(), ours(3, "reference").detach(), exact.detach())

    return harness.Case(
        "learned_linear",
        "float32",
        f"N{n} K{k} B{b}",
        0.5,
        # W and scores forward, W and the gradient of scores and W again backward.
        5 * w.nbytes + 3 * w.numel() // 8,
        verify,
        {
            "fastmask": step(ours, logits),
            "eager float": step(lambda i: F.linear(x, w * gumbel(logits)), logits),
            "best eager": step(lambda i: F.linear(x, w * passing(logits)), logits),
            "dense": step(lambda i: F.linear(x, trained), trained),
        },
    )


def cases() -> Iterator[harness.Case]:
    """Every case, made when it is its turn."""
    for n, k in ((4096, 4096), (768, 3072), (7, 1280)):
        for b in (8, 64, 256):
            yield case(n, k, b)


if __name__ == "__main__":
    harness.report(cases(), __doc__)
