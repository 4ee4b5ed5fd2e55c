"""unpack: the inverse of pack, for one mask and for several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmask import ops
from fastmask.testing import ADVERSARIAL_SHAPES, mask, opcheck


def test_literal_bools() -> None:
    bits = torch.tensor([0b101, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)
    assert ops.unpack(bits, (2, 2)).tolist() == [[True, False], [True, False]]


@given(st.lists(st.booleans(), max_size=300))
def test_inverse_of_pack(bools: list[bool]) -> None:
    m = torch.tensor(bools, dtype=torch.bool)
    assert torch.equal(ops.unpack(ops.pack(m), m.shape), m)


@pytest.mark.parametrize("shape", ADVERSARIAL_SHAPES)
def test_several_masks(shape: tuple[int, int]) -> None:
    m = mask(3, *shape)
    bits = torch.stack([ops.pack(one) for one in m])
    assert torch.equal(ops.unpack(bits, shape), m)


def test_opcheck_and_compile() -> None:
    m = mask(37, 45)
    opcheck(torch.ops.fastmask.unpack, (ops.pack(m), m.numel(), "auto"))
    compiled = torch.compile(lambda b: ops.unpack(b, (37, 45)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ops.pack(m)), m)


def test_what_it_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"bits: expected \(8,\) or \(S, 8\) bytes for shape \(2, 3\)"
    ):
        ops.unpack(torch.zeros(16, dtype=torch.uint8), (2, 3))
    with pytest.raises(TypeError, match="bits: expected dtype torch.uint8, got torch.int64"):
        ops.unpack(torch.zeros(8, dtype=torch.int64), (2, 3))
