"""One case of each op under pytest-benchmark, to compare this tree with an earlier one on the same machine.

pytest benchmarks --benchmark-only --benchmark-autosave
pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

Each is verified first, and skipped with the reason where no compiled back end runs it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmask._benchmarks import harness

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A shape that takes milliseconds at most, so that one op is measured in a second.
SHAPES = {
    "masked_linear": "1024x1024x8",
    "learned_linear": "1024x1024x8",
    "learned_linear_step_": "1024x1024x8",
    "compressed_linear": "1024x1024x1",
    "learned_weight": "1024x1024",
    "masked_weights": "resnet18",
    "learned_weights": "resnet18",
    "masked_conv2d": "default",
    "learned_conv2d": "default",
    "masked_sgd_": "resnet18",
    "masked_adamw_": "resnet18",
    "restore_frozen_": "resnet18",
}


@pytest.mark.parametrize("op", harness.ops())
def test_speed(op: str, benchmark: Any) -> None:
    setup = harness.Setup(device=DEVICE, shapes=(SHAPES.get(op, "1048576"),))
    case = next(harness.cases(op, setup))
    names, refused = harness.backends(case, setup)
    if not names:
        pytest.skip("; ".join(refused) or "no compiled back end runs here")
    contest = case.prepare()
    with torch.set_grad_enabled(contest.grad):
        contest.verify(names[0])
        counter = iter(range(10**9))

        def once() -> None:
            contest.ours(names[0], next(counter))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(case=str(case), backend=names[0])
        benchmark(once)
