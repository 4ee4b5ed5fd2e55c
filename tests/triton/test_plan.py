"""The path of a product by shape, dtype and device, with no device: few rows, tiles, scratch."""

from __future__ import annotations

import pytest
import torch

from fastmask._triton.plan import Plan, dense_first, device, plan

HALF, SINGLE = torch.bfloat16, torch.float32
SHAPES = [(4096, 4096), (4096, 11008), (8192, 28672), (768, 3072), (512, 7), (1000, 1280), (1, 1)]


def paths(N: int, K: int, dtype: torch.dtype, capability: int, samples: int = 1) -> list[str]:
    """The paths of ever more rows a mask."""
    rows = [samples * 2**i for i in range(18)]
    return [plan(B, N, K, samples, dtype, capability).path for B in rows]


@pytest.mark.parametrize("capability", [70, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [HALF, SINGLE, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_rows_never_lead_back(
    shape: tuple[int, int], dtype: torch.dtype, capability: int
) -> None:
    for samples in (1, 4):
        found = paths(*shape, dtype, capability, samples)
        assert found == sorted(found, key=["few", "tiles", "scratch"].index)
        assert found[:3] == ["few"] * 3 and found[3] != "few", "4 rows a mask, then tensor cores"


def test_a_large_weight_under_many_rows_is_selected_once() -> None:
    """The model of bytes and operations: tiles win where bytes decide, torch where operations do."""
    for N, K in SHAPES[:3]:
        assert plan(256, N, K, 1, HALF, 90).path == "tiles"
        assert plan(1024, N, K, 1, HALF, 90).path == "scratch"
        assert not dense_first(256, N, K, HALF, 90) and dense_first(2048, N, K, HALF, 90)
        # float32 without TF32 is bound by operations thirteen times sooner.
        assert plan(256, N, K, 1, SINGLE, 90).path == "scratch"
        assert plan(256, N, K, 1, SINGLE, 90, tf32=True).path == "tiles"
    assert plan(1024, 512, 7, 1, HALF, 90).path == "tiles", "two launches for nothing"


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_blocks_stay_in_l2(capability: int, dtype: torch.dtype) -> None:
    found = plan(2**20, 8192, 28672, 1, dtype, capability)
    assert found.path == "scratch"
    assert found.block * dtype.itemsize <= min(20 << 20, device(capability).cache // 3)


def test_unknown_devices_are_planned_for_as_the_ones_before_them() -> None:
    assert device(75) == device(80) and device(87) == device(86) and device(121) == device(100)
    assert plan(8, 64, 64, 8, HALF, 90) == Plan("few")
