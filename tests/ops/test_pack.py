"""pack: literal bits, numpy's layout, thresholds, ties, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmask import ops
from fastmask.testing import ADVERSARIAL_SHAPES, mask, non_contiguous, opcheck, values


def test_literal_bits() -> None:
    one = torch.tensor([True, False, True, False, False, False, False, True, False, True])
    assert ops.pack(one).tolist() == [0b10000101, 0b10, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [*ADVERSARIAL_SHAPES, (0, 5), ()])
def test_equal_to_numpy(shape: tuple[int, ...]) -> None:
    m = mask(*shape)
    want = np.packbits(m.cpu().numpy().ravel(), bitorder="little")
    got = ops.pack(m)
    assert got.dtype == torch.uint8
    assert got.numel() == -(-m.numel() // 64) * 8
    assert got.tolist() == want.tolist() + [0] * (got.numel() - want.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_above_a_threshold_strictly(dtype: torch.dtype) -> None:
    scores = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, float("nan"), float("inf"), -float("inf")])
    assert ops.pack(scores.to(dtype), 0.0).tolist()[0] == 0b01011000
    assert ops.pack(scores.to(dtype), 0.5).tolist()[0] == 0b01010000
    assert ops.pack(scores.to(dtype), -1.0).tolist()[0] == 0b01011110


def test_strides_do_not_matter() -> None:
    m = mask(37, 45)
    assert torch.equal(ops.pack(m.T), ops.pack(m.T.contiguous()))
    assert torch.equal(ops.pack(non_contiguous(m)), ops.pack(m))


def test_opcheck_and_compile() -> None:
    opcheck(torch.ops.fastmask.pack, (mask(37, 45), 0.0, "auto"))
    compiled = torch.compile(lambda s: ops.pack(s, 0.25), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values(37, 45)), ops.pack(values(37, 45), 0.25))


def test_what_it_refuses() -> None:
    with pytest.raises(
        TypeError, match="mask: expected dtype torch.bool, or scores together with mu"
    ):
        ops.pack(torch.zeros(3))
    with pytest.raises(TypeError, match="mask: expected dtype float32.*got torch.bool"):
        ops.pack(torch.zeros(3, dtype=torch.bool), 0.0)
    with pytest.raises(TypeError, match="mask: expected a torch.Tensor, got list"):
        ops.pack([True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mu: expected a finite number, got nan"):
        ops.pack(torch.zeros(3), float("nan"))
    with pytest.raises(TypeError, match="mask: expected a dense tensor"):
        ops.pack(torch.eye(3).to_sparse(), 0.0)


def test_scores_that_require_gradients_are_read_only() -> None:
    scores = values(5).requires_grad_()
    assert not ops.pack(scores, 0.0).requires_grad
