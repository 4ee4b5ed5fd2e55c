"""Every test of an op runs on each back end of the op that is present.

On the CPU engine once for each instruction set. Where there is a GPU also on tensors of it: the default
device is the GPU in those tests, whose names have `device-`. With TRITON_INTERPRET=1 set before Python
starts, on Triton's kernels in its interpreter alone (`interpreted-triton`), slowly.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmask import _backend

OPS = Path(_backend.__file__).parent / "ops"
AS_CALLED = "auto"


def engines(op: str) -> list[str]:
    """The back ends of an op that run here."""
    present = [b for b in _backend.BACKENDS if (OPS / op / f"{b}.py").exists()]
    present = [b for b in present if _backend.missing(b) is None]
    if _backend.interpreted():
        return [f"interpreted-{b}" for b in present if b == "triton"]
    names = ["reference"]
    if "cpu" in present:
        from fastmask import _cpu

        isas = _cpu.isas()
        # AVX-512 with and without BF16 are one code but for products.
        same = "avx512" if "avx512bf16" in isas and not op.endswith("_linear") else None
        names += [f"cpu-{isa}" for isa in isas if isa != same]
    if torch.cuda.is_available():
        names += [f"device-{b}" for b in present if b != "cpu"]
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    rooms = sorted((p.name for p in OPS.iterdir() if (p / "op.py").exists()), key=len, reverse=True)
    op = next((room for room in rooms if stem == room or stem.startswith(f"{room}_")), None)
    if op is None:
        return
    names = engines(op)
    if stem != op:  # a second file of an op: as it is called, and on devices
        names = [AS_CALLED, *(name for name in names if name.startswith("device-"))]
    if len(names) > 1 or _backend.interpreted():
        metafunc.parametrize("engine", names, indirect=True)


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `auto` take one back end, on one instruction set; in other files than an op's, what it takes."""
    if getattr(request, "param", AS_CALLED) == AS_CALLED:
        yield
        return
    kind, _, which = request.param.partition("-")
    name = which if kind in ("device", "interpreted") else kind
    monkeypatch.setattr(_backend, "preference", lambda _device: tuple({name: 0, "reference": 0}))
    _backend._resolve.cache_clear()
    before = None
    if kind == "cpu":
        from fastmask import _cpu

        before = _cpu.isa()
        _cpu.use(which)
    with contextlib.ExitStack() as here:
        if kind == "device":
            here.enter_context(torch.device("cuda"))
            # What is compared with is computed in float32 where it says so, and twice the same.
            cudnn = torch.backends.cudnn
            here.enter_context(cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # one back end's compilations are not counted against the next
        yield
    if before is not None:
        _cpu.use(before)
    _backend._resolve.cache_clear()
