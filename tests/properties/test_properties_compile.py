"""Compiled code computes what eager code does, in one graph, whatever the shapes and options.

The back ends `eager` and `aot_eager` run the same kernels from the captured graphs, so equality is of bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmask import ops
from fastmask.testing import assert_same_bits, values

SIDES = st.integers(1, 9)
OPTIONS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": 7, "tau": 0.5},
    {"method": "threshold", "mu": 0.1, "off": "flip"},
    {"method": "topk", "density": 0.4, "scale": "rsqrt_density"},
]
few = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])


def agree(function: Any, backend: str, leaves: list[Tensor]) -> None:
    """Compare outputs and all gradients; a graph break is an error."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    want, got = function(*leaves), compiled(*leaves)
    assert_same_bits(got, want)
    dy = values(*want.shape, seed=9)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert_same_bits(ours, theirs)


def leaf(*shape: int, seed: int) -> Tensor:
    return values(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(SIDES, SIDES, st.integers(1, 3), st.integers(1, 3), st.booleans())
@few
def test_masked_linear(
    backend: str, n: int, k: int, samples: int, rows: int, leading: bool
) -> None:
    active = torch.stack([ops.pack(values(n, k, seed=5 + i), 0.0) for i in range(samples)])
    shape = (samples * rows, 1, k) if leading else (samples * rows, k)
    leaves = [leaf(*shape, seed=0), leaf(n, k, seed=1), leaf(n, seed=2)]
    agree(lambda x, w, b: ops.masked_linear(x, w, active, b), backend, leaves)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(SIDES, SIDES, st.sampled_from(OPTIONS), st.integers(1, 3))
@few
def test_learned_linear(backend: str, n: int, k: int, options: dict[str, Any], rows: int) -> None:
    leaves = [leaf(rows, k, seed=0), leaf(n, k, seed=1), leaf(n, k, seed=2)]
    agree(lambda x, w, s: ops.learned_linear(x, w, s, **options), backend, leaves)


@given(SIDES, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.sampled_from(OPTIONS))
@few
def test_learned_conv2d(
    n: int, side: int, stride: int, padding: int, options: dict[str, Any]
) -> None:
    leaves = [
        leaf(2, 3, 5, 4, seed=0),
        leaf(n, 3, side, side, seed=1),
        leaf(n, 3, side, side, seed=2),
    ]
    agree(
        lambda x, w, s: ops.learned_conv2d(x, w, s, stride=stride, padding=padding, **options),
        "aot_eager", leaves,
    )  # fmt: skip
