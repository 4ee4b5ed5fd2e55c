"""popcount: the number of ones."""

from __future__ import annotations

import pytest
import torch

from fastmask import ops
from fastmask.testing import mask, opcheck


def test_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    counts = torch.stack([ops.popcount(byte.repeat(8)) for byte in every])
    assert counts.tolist() == [8 * bin(i).count("1") for i in range(256)]


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 100_003])
def test_equals_the_sum(numel: int) -> None:
    m = mask(numel, density=0.3)
    assert ops.popcount(ops.pack(m)).item() == m.sum().item()


def test_one_count_for_each_mask() -> None:
    m = mask(4, 37, 45)
    counts = ops.popcount(torch.stack([ops.pack(one) for one in m]))
    assert counts.dtype == torch.int64
    assert counts.tolist() == m.sum(dim=(1, 2)).tolist()


def test_opcheck_and_compile() -> None:
    bits = ops.pack(mask(37, 45))
    opcheck(torch.ops.fastmask.popcount, (bits, "auto"))
    compiled = torch.compile(ops.popcount, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(bits), ops.popcount(bits))


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="bits: expected dtype torch.uint8, got torch.bool"):
        ops.popcount(torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bits: expected shape \(bytes,\) or \(S, bytes\)"):
        ops.popcount(torch.zeros(2, 2, 8, dtype=torch.uint8))
