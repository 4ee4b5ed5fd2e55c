"""learned_weights: the masked weights of all layers of a network, drawn at once, and their scores' gradients.

python benchmarks/bench_learned_weights.py [--shapes resnet18,resnet50,all] [--device cpu] [--csv FILE]

The sizes are those of the network's convolutions, as `fastmask.nn.prepared` has them in training. `eager
float` is the Gumbel-sigmoid, straight-through, layer by layer; `best eager` compares one uniform draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.testing import assert_within_budget

# Norms, biases and the head take no part.
LEAST = 4096


def case(setup: harness.Setup, name: str, sizes: Sequence[int], dtype: torch.dtype) -> harness.Case:
    """One network, a draw and its gradients a step."""
    device = setup.device
    sizes = [n for n in sizes if n >= LEAST] or sizes
    entries = sum(sizes)

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        weights, upstream = (
            [torch.randn(n, device=device).to(dtype) for n in sizes] for _ in range(2)
        )
        scores = [torch.randn(n, device=device).requires_grad_() for n in sizes]
        seeds = torch.arange(len(sizes), device=device)

        def gradients(kind: torch.dtype, backend: str, among: torch.dtype) -> list[Tensor]:
            learned = [s.detach().to(among).requires_grad_() for s in scores]
            read, given = ([t.to(kind) for t in some] for some in (weights, upstream))
            made = ops.learned_weights(read, learned, seeds=seeds, backend=backend)
            grads = torch.autograd.grad(made, learned, given)
            return [torch.cat([t.detach() for t in many]) for many in (made, grads)]

        def verify(backend: str) -> None:
            exact = gradients(torch.float64, "reference", torch.float64)
            plain = gradients(dtype, "reference", torch.float32)
            for got, other, true in zip(
                gradients(dtype, backend, torch.float32), plain, exact, strict=True
            ):
                assert_within_budget(got, other, true)

        def step(made: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], object]:
            return lambda i: torch.autograd.grad(
                [made(w, s) for w, s in zip(weights, scores, strict=True)], scores, upstream
            )

        def ours(backend: str, i: int) -> object:
            made = ops.learned_weights(weights, scores, backend=backend)
            return torch.autograd.grad(made, scores, upstream)

        found = {
            "eager float": step(lambda w, s: w * rivals.gumbel(s).to(dtype)),
            "best eager": step(lambda w, s: w * rivals.passing(s).to(dtype)),
        }
        return harness.Contest(verify, ours, found, grad=True)

    # W and scores read, W' written; its gradient, W and scores read, the scores' gradient written.
    moved = entries * (4 * dtype.itemsize + 3 * 4)
    shape = f"{name} {len(sizes)}t"
    return harness.Case("learned_weights", dtype, shape, 0.5, moved, prepare, traffic="copy")


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.float32, torch.bfloat16)):
        for name, sizes in shapes.parameters(setup.shapes, ("resnet18",)):
            yield case(setup, name, sizes, dtype)


if __name__ == "__main__":
    harness.main("learned_weights", __doc__)
