"""topk_mask: by hand, its order among equals, the exact number of ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from promises import unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import ADVERSARIAL_SHAPES, non_contiguous, opcheck, poisoned_memory, values

NAN, INF = float("nan"), float("inf")


def kept(scores: Tensor, density: float) -> list[int]:
    """Indices of the ones."""
    bits = ops.unpack(ops.topk_mask(scores, density), scores.shape)
    return bits.flatten().nonzero().flatten().tolist()


def test_by_hand() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.4])
    assert kept(scores, 0.4) == [2, 3]
    assert kept(scores, 0.6) == [2, 3, 4]
    assert kept(scores, 0.0) == []
    assert kept(scores, 1.0) == [0, 1, 2, 3, 4]
    assert ops.topk_mask(scores, 0.4).tolist() == [0b01100, 0, 0, 0, 0, 0, 0, 0]


def test_halves_round_up() -> None:
    scores = torch.arange(5).float()
    assert [len(kept(scores, d)) for d in (0.09, 0.1, 0.29, 0.3, 0.5, 0.9)] == [0, 1, 1, 2, 3, 5]


def test_the_lower_index_wins_among_equals() -> None:
    assert kept(torch.ones(100), 0.3) == list(range(30))
    assert kept(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 0.6) == [0, 1, 3]
    assert kept(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 0.5) == [0, 1], (
        "zeros of both signs are equal"
    )


def test_nan_ranks_with_minus_infinity() -> None:
    scores = torch.tensor([NAN, -INF, -1.0, INF, -NAN])
    assert kept(scores, 0.2) == [3]
    assert kept(scores, 0.4) == [2, 3]
    assert kept(scores, 0.6) == [0, 2, 3]
    assert kept(scores, 0.8) == [0, 1, 2, 3]


@given(
    st.lists(st.sampled_from([NAN, INF, -INF, -1.0, 0.0, -0.0, 1.0, 1e-45, 2.5]), max_size=150),
    st.floats(0, 1),
)
def test_against_a_sort_in_python(scores: list[float], density: float) -> None:
    n = len(scores)
    rank = sorted(range(n), key=lambda i: (INF if math.isnan(scores[i]) else -scores[i], i))
    want = sorted(rank[: math.floor(density * n + 0.5)])
    assert kept(torch.tensor(scores), density) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*ADVERSARIAL_SHAPES, (0, 3), ()])
def test_exact_count_in_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = values(*shape, dtype=dtype)
    n = scores.numel()
    for density in (0.0, 0.1, 0.5, 0.93, 1.0):
        with poisoned_memory():
            bits = ops.topk_mask(scores, density)
        assert bits.shape == (-(-n // 64) * 8,)
        assert int(ops.popcount(bits)) == math.floor(density * n + 0.5)
        ones = ops.unpack(bits, scores.shape)
        if 0 < ones.sum() < n:
            assert scores[ones].min() >= scores[~ones].max()
        assert not np.unpackbits(bits.cpu().numpy(), bitorder="little")[n:].any(), "padding"
        assert torch.equal(ops.topk_mask(non_contiguous(scores), density), bits)


def test_no_gradient_and_scores_that_ask_for_one() -> None:
    scores = values(5, 7).requires_grad_()
    assert not ops.topk_mask(scores, 0.5).requires_grad


def test_opcheck_and_compiled_code() -> None:
    opcheck(torch.ops.fastmask.topk_mask, (values(37, 45), 0.3, "auto"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda scores: ops.topk_mask(scores, 0.3), fullgraph=True, backend=counter
    )
    for seed in range(3):
        scores = values(37, 45, seed=seed)
        assert torch.equal(compiled(scores), ops.topk_mask(scores, 0.3))
    assert counter.frame_count == 1


def test_what_it_refuses() -> None:
    scores = torch.zeros(5)
    for density in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"density: expected a share in \[0, 1\], got"):
            ops.topk_mask(scores, density)
    with pytest.raises(ValueError, match="density: expected a finite number, got nan"):
        ops.topk_mask(scores, NAN)
    with pytest.raises(TypeError, match="density: expected a number, got str"):
        ops.topk_mask(scores, "half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scores: expected dtype float32"):
        ops.topk_mask(scores.long(), 0.5)
    with pytest.raises(
        BackendUnavailable, match=f"topk_mask: back end '{unusable()}' cannot be used"
    ):
        ops.topk_mask(scores, 0.5, backend=unusable())
