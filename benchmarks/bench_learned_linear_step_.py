"""learned_linear_step_: forward, backward and SGD's step of the scores, taken within the backward.

python benchmarks/bench_learned_linear_step_.py [--shapes NAME,...] [--device cpu] [--csv FILE]

`best eager` is learned_linear's own backward and then torch's fused step; `eager float` the Gumbel-sigmoid as
it is written in PyTorch, and that step. Both hold a gradient of the scores in between, 4 N K bytes (67 MB for
4096 x 4096), written and read once more, which is not there in ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes
from fastmask.optim import step_in_backward
from fastmask.testing import assert_within_budget


def case(
    setup: harness.Setup, n: int, k: int, b: int, momentum: float, dtype: torch.dtype
) -> harness.Case:
    """W (n, k), x (b, k), one sample."""
    rule: dict[str, Any] = {"lr": 1e-3, "momentum": momentum}

    def prepare() -> harness.Contest:
        torch.manual_seed(0)
        x = torch.randn(b, k, device=setup.device).to(dtype).requires_grad_()
        w = torch.randn(n, k, device=setup.device).to(dtype)
        dy = torch.randn(b, n, device=setup.device).to(dtype)
        scores = torch.randn(n, k, device=setup.device)

        def stepped(
            kind: torch.dtype, backend: str, among: torch.dtype = torch.float32
        ) -> list[Tensor]:
            rows, grad, weight = (t.detach().to(kind) for t in (x, dy, w))
            theta = scores.detach().to(among, copy=True)
            held = torch.ones_like(theta) if momentum else None
            active = ops.sample_mask(theta, 3, backend="reference")
            ops.learned_linear_step_(
                grad, rows, weight, theta, active, held, **rule, seed=3, backend=backend
            )
            return [theta] if held is None else [theta, held]

        def verify(backend: str) -> None:
            exact = stepped(torch.float64, "reference", torch.float64)
            plain = stepped(dtype, "reference")
            for got, other, true in zip(stepped(dtype, backend), plain, exact, strict=True):
                assert_within_budget(got, other, true)

        ours_leaf, leaf, eager_leaf = (scores.clone().requires_grad_() for _ in range(3))
        step_in_backward([ours_leaf], **rule)

        def ours(backend: str, i: int) -> None:
            x.grad = None
            ops.learned_linear(x, w, ours_leaf, seed=i, backend=backend).backward(dy)

        fused = torch.optim.SGD([leaf], fused=True, **rule)
        eager = torch.optim.SGD([eager_leaf], fused=True, **rule)

        def apart(i: int) -> None:
            x.grad = None
            ops.learned_linear(x, w, leaf, seed=i).backward(dy)
            fused.step()
            fused.zero_grad()

        def written(_: int) -> None:
            x.grad = None
            F.linear(x, w * rivals.gumbel(eager_leaf).to(dtype)).backward(dy)
            eager.step()
            eager.zero_grad()

        found = {"eager float": written, "best eager": apart}
        return harness.Contest(verify, ours, found, grad=True)

    # W and scores forward, W again for dx and for the step, which reads and writes scores (and momentum).
    weights = n * k * (3 * dtype.itemsize + 4 + 8 + (8 if momentum else 0))
    return harness.Case(
        "learned_linear_step_", dtype, f"N{n} K{k} B{b} momentum {momentum}", 0.5,
        weights + dtype.itemsize * b * (3 * k + 3 * n), prepare, 6 * n * k * b,
    )  # fmt: skip


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    rows = (64, 1024) if setup.device.type == "cuda" else (8, 64, 256)
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.bfloat16, torch.float32)):
        for name in setup.shapes:
            if name in ("default", "all"):
                sizes = [(4096, 4096, b) for b in rows]
            elif name == "tiny":
                sizes = [(37, 45, 6)]
            else:
                sizes = list(shapes.linear((name,), setup.device.type))
            for n, k, b in sizes:
                for momentum in (0.0, 0.9):
                    yield case(setup, n, k, b, momentum, dtype)


if __name__ == "__main__":
    harness.main("learned_linear_step_", __doc__)
