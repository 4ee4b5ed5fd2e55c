"""A pytest plugin: back end `cuda` is the module that FASTMASK_CUDA_EMULATED names, on tensors of the CPU.

With FASTMASK_CUDA_AUTO=1 the tests of an op that would run on its reference run on `cuda`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

import fastmask
from fastmask import _backend

_spec = importlib.util.spec_from_file_location(
    "fastmask._cuda", os.environ["FASTMASK_CUDA_EMULATED"]
)
assert _spec is not None and _spec.loader is not None
_cuda = sys.modules["fastmask._cuda"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cuda)
fastmask._cuda = _cuda  # type: ignore[attr-defined]

_really_missing = _backend.missing
_backend.missing = lambda name: None if name == "cuda" else _really_missing(name)  # type: ignore
_backend._DEVICES["cuda"] = "cpu"
# What is asked of `auto` is the reference, unless a test says otherwise.
_backend.preference = lambda _device: ("reference",)  # type: ignore[assignment]

if os.environ.get("FASTMASK_CUDA_AUTO") == "1":
    _taken: set[str] = set()
    _module = _backend._module

    def _noted(op: str, name: str):  # type: ignore[no-untyped-def]
        found = _module(op, name)
        if name == "cuda" and found is not None:
            _taken.add(op)
        return found

    _backend._module = _noted  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def _takes_cuda(engine: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(_backend, "preference", lambda _device: ("cuda", "reference"))
        _backend._resolve.cache_clear()
        yield
        _backend._resolve.cache_clear()

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"resolved to cuda: {' '.join(sorted(_taken))}")
