"""Tile shapes by measurement: with FASTMASK_AUTOTUNE=1 in the environment, once for each shape and device.

Without it, and while a CUDA graph is captured, the first candidate is taken, which depends on shapes alone.
What was measured is kept in the user's cache folder (FASTMASK_CACHE). Tiles of other shapes add in another
order: with tuning on, two machines, or one before and after, may differ in the last bits of a product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask import _store

Shape = tuple[int, ...]

_chosen: dict[tuple[Any, ...], Shape] = {}


def best(
    kernel: str,
    key: tuple[Any, ...],
    candidates: Sequence[Shape],
    run: Callable[[Shape], object],
    like: Tensor,
) -> Shape:
    """The fastest of the candidates for what `key` says, the first where nothing is to be measured."""
    if not asked(like):
        return candidates[0]
    name = torch.cuda.get_device_name(like.device)
    known = (kernel, name, like.dtype, *key)
    if known not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        import triton

        depends = {
            "device": name,
            "kernel": kernel,
            "shape": repr((str(like.dtype), *key)),
            "candidates": repr(list(candidates)),
            "triton": triton.__version__,
            "torch": torch.__version__,
        }
        found = _store.fetch("auto", f"tiles-{kernel}", depends, lambda: _measured(candidates, run))
        _chosen[known] = candidates[int(found["choice"])]
    return _chosen[known]


def asked(like: Tensor) -> bool:
    """Whether to measure: the switch is set and there is a device."""
    return os.environ.get("FASTMASK_AUTOTUNE") == "1" and like.is_cuda


def bucket(rows: int) -> int:
    """Numbers of rows that share a choice: up to a power of two."""
    return 1 << max(0, rows - 1).bit_length()


def _measured(candidates: Sequence[Shape], run: Callable[[Shape], object]) -> dict[str, Tensor]:
    times = torch.tensor([seconds(run, shape) for shape in candidates], dtype=torch.float64)
    # Where nothing fits, the launch itself says why.
    return {"choice": times.argmin(), "seconds": times}


def seconds(run: Callable[[Shape], object], shape: Shape) -> float:
    """Median time of a launch with a cold L2; infinite where the device lacks memory for its tiles."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        taken = do_bench(lambda: run(shape), warmup=10, rep=40, return_mode="median")
    except OutOfResources:
        return float("inf")
    return float(taken) / 1e3
