"""Every test of an op runs on each back end of the op that is present, and on each instruction set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmask import _backend

OPS = Path(_backend.__file__).parent / "ops"


def engines(op: str) -> list[str]:
    """The back ends of an op that run here, the CPU engine once for each instruction set."""
    if not (OPS / op / "cpu.py").exists() or _backend.missing("cpu") is not None:
        return ["reference"]
    from fastmask import _cpu

    return ["reference", *(f"cpu-{isa}" for isa in _cpu.isas())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    names = engines(op)
    if len(names) > 1:
        metafunc.parametrize("engine", names, indirect=True)


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `auto` take one back end, on one instruction set; in other files than an op's, what it takes."""
    if not hasattr(request, "param"):
        yield
        return
    name, _, isa = request.param.partition("-")
    monkeypatch.setattr(_backend, "preference", lambda _device: tuple({name: 0, "reference": 0}))
    _backend._resolve.cache_clear()
    before = None
    if isa:
        from fastmask import _cpu

        before = _cpu.isa()
        _cpu.use(isa)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # one back end's compilations are not counted against the next
    yield
    if before is not None:
        _cpu.use(before)
    _backend._resolve.cache_clear()
