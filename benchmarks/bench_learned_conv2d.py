"""learned_conv2d: draw, forward and backward of a convolution whose mask is learned.

python benchmarks/bench_learned_conv2d.py [--shapes resnet18|resnet50|vit|all] [--device cpu] [--csv FILE]

`eager float` is the Gumbel-sigmoid, straight-through, as it is written in PyTorch; `best eager` compares one
uniform draw; `dense` trains the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from fastmask._benchmarks.bench_masked_conv2d import cost, name, tensors
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.testing import assert_within_budget


def case(setup: harness.Setup, layer: shapes.Conv, dtype: torch.dtype) -> harness.Case:
    """One layer, one sample a step."""
    device = setup.device

    def prepare() -> harness.Contest:
        x, w, options = tensors(layer, device, dtype)
        x = x.requires_grad_()
        scores = torch.randn(w.shape, device=device).requires_grad_()
        trained = w.clone().requires_grad_()
        dy = torch.randn_like(F.conv2d(x.detach(), w, **options))

        def gradients(kind: torch.dtype, backend: str, among: torch.dtype) -> tuple[Tensor, ...]:
            images, learned = (
                t.detach().to(d).requires_grad_() for t, d in ((x, kind), (scores, among))
            )
            y = ops.learned_conv2d(images, w.to(kind), learned, seed=3, **options, backend=backend)
            return y.detach(), *torch.autograd.grad(y, (images, learned), dy.to(kind))

        def verify(backend: str) -> None:
            exact = gradients(torch.float64, "reference", torch.float64)
            plain = gradients(dtype, "reference", torch.float32)
            got = gradients(dtype, backend, torch.float32)
            for ours, other, true in zip(got, plain, exact, strict=True):
                assert_within_budget(ours, other, true)

        def step(output: Callable[[int], Tensor], leaf: Tensor) -> Callable[[int], object]:
            return lambda i: torch.autograd.grad(output(i), (x, leaf), dy)

        def origin() -> Tensor:
            return F.conv2d(x, w * rivals.gumbel(scores).to(dtype), **options)

        def ours(backend: str, i: int) -> object:
            y = ops.learned_conv2d(x, w, scores, seed=i, **options, backend=backend)
            return torch.autograd.grad(y, (x, scores), dy)

        passing = lambda i: F.conv2d(x, w * rivals.passing(scores).to(dtype), **options)  # noqa: E731
        found = {
            "eager float": step(lambda i: origin(), scores),
            "best eager": step(passing, scores),
            "dense": step(lambda i: F.conv2d(x, trained, **options), trained),
        }
        if setup.compiled:
            compiled = rivals.compiled(origin, device)
            found["compile"] = step(lambda i: compiled(), scores)  # type: ignore[arg-type,return-value]
        return harness.Contest(verify, ours, found, grad=True)

    moved, flops = cost(layer, dtype)
    return harness.Case("learned_conv2d", dtype, name(layer), 0.5, 3 * moved, prepare, 3 * flops)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.bfloat16, torch.float32)):
        for layer in shapes.conv(setup.shapes, setup.device.type):
            yield case(setup, layer, dtype)


if __name__ == "__main__":
    harness.main("learned_conv2d", __doc__)
