"""learned_weight: the masked weight itself and the gradient of its scores.

python benchmarks/bench_learned_weight.py [--shapes NAME,...] [--device cpu] [--compile] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.testing import assert_within_budget


def case(setup: harness.Setup, n: int, k: int, dtype: torch.dtype) -> harness.Case:
    """W (n, k), one sample a step."""
    device = setup.device

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        w, dw = (torch.randn(n, k, device=device).to(dtype) for _ in range(2))
        scores = torch.randn(n, k, device=device).requires_grad_()

        def gradients(kind: torch.dtype, backend: str, among: torch.dtype) -> tuple[Tensor, Tensor]:
            learned = scores.detach().to(among).requires_grad_()
            made = ops.learned_weight(w.to(kind), learned, seed=3, backend=backend)[0]
            return made.detach(), torch.autograd.grad(made, learned, dw.to(kind))[0]

        def verify(backend: str) -> None:
            exact = gradients(torch.float64, "reference", torch.float64)
            plain = gradients(dtype, "reference", torch.float32)
            for got, other, true in zip(
                gradients(dtype, backend, torch.float32), plain, exact, strict=True
            ):
                assert_within_budget(got, other, true)

        def step(made: Callable[[], Tensor]) -> Callable[[int], object]:
            return lambda i: torch.autograd.grad(made(), scores, dw)

        def ours(backend: str, i: int) -> object:
            made = ops.learned_weight(w, scores, seed=i, backend=backend)[0]
            return torch.autograd.grad(made, scores, dw)

        origin = lambda: w * rivals.gumbel(scores).to(dtype)  # noqa: E731
        found = {
            "eager float": step(origin),
            "best eager": step(lambda: w * rivals.passing(scores).to(dtype)),
        }
        if setup.compiled:
            found["compile"] = step(rivals.compiled(origin, device))  # type: ignore[arg-type]
        return harness.Contest(verify, ours, found, grad=True)

    # W and scores read, W' written; its gradient, W and scores read, the scores' gradient written.
    moved = n * k * (4 * dtype.itemsize + 3 * 4)
    return harness.Case("learned_weight", dtype, f"N{n} K{k}", 0.5, moved, prepare, traffic="copy")


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.bfloat16, torch.float32)):
        layers = [(768, 3072), (4096, 4096)] if "default" in setup.shapes else []
        others = [name for name in setup.shapes if name != "default"]
        layers += [(n, k) for n, k, _ in shapes.linear(others, setup.device.type)]
        for n, k in dict.fromkeys(layers):
            yield case(setup, n, k, dtype)


if __name__ == "__main__":
    harness.main("learned_weight", __doc__)
