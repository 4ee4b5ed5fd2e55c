"""One dispatch: a named back end is used or refused with its reason, never replaced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastmask import _backend, ops
from fastmask.errors import BackendUnavailable


def test_reference_always_runs() -> None:
    assert _backend.missing("reference") is None
    bits = ops.pack(torch.tensor([True, False]), backend="reference")
    assert bits.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_missing_back_end_is_named_with_its_reason(name: str) -> None:
    reason = _backend.missing(name)
    if reason is None:
        pytest.skip(f"back end {name} runs here")
    with pytest.raises(BackendUnavailable, match=f"pack: back end '{name}'.*{reason[:20]}"):
        ops.pack(torch.tensor([True]), backend=name)


def test_a_name_that_is_no_back_end_is_refused() -> None:
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda"):
        ops.pack(torch.tensor([True]), backend="gpu")


def test_auto_ends_at_the_reference() -> None:
    assert _backend.preference("cpu") == ("cpu", "reference")
    assert _backend.preference("cuda") == ("cuda", "triton", "reference")
    assert _backend.preference("meta") == ("reference",)


def test_a_back_end_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _backend.missing
    monkeypatch.setattr(_backend, "missing", lambda name: None if name == "triton" else real(name))
    monkeypatch.setattr(_backend, "_module", lambda _op, _name: _backend)
    with pytest.raises(BackendUnavailable, match="works on cuda tensors and these are on cpu"):
        _backend._resolve.__wrapped__("pack", "triton", "cpu", None)


def test_an_op_without_that_back_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "missing", lambda _name: None)
    monkeypatch.setattr(_backend, "_module", lambda _op, _name: None)
    with pytest.raises(BackendUnavailable, match="it has no pack yet"):
        _backend._resolve.__wrapped__("pack", "cpu", "cpu", None)


def test_a_dtype_that_a_back_end_lacks_is_left_to_the_reference_or_refused() -> None:
    if _backend.missing("cpu") is not None:
        pytest.skip(f"no CPU engine: {_backend.missing('cpu')}")
    device = torch.device("cpu")
    found = _backend.resolve("pack", "auto", device, torch.float16).__name__
    assert found == "fastmask.ops.pack.reference"
    found = _backend.resolve("pack", "auto", device, torch.float32).__name__
    assert found == "fastmask.ops.pack.cpu"
    with pytest.raises(BackendUnavailable, match="computes in bool, float32, bfloat16 and these"):
        ops.pack(torch.zeros(3, dtype=torch.float64), 0.0, backend="cpu")


def test_an_instruction_set_that_is_not_there_is_an_error_not_a_fallback() -> None:
    if _backend.missing("cpu") is not None:
        pytest.skip(f"no CPU engine: {_backend.missing('cpu')}")
    program = "import torch; from fastmask import ops; ops.pack(torch.ones(3, dtype=torch.bool))"
    for isa, code in (("portable", 0), ("mmx", 1)):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "FASTMASK_CPU_ISA": isa},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == code, run.stderr
    assert "FASTMASK_CPU_ISA: expected one of" in run.stderr and "got 'mmx'" in run.stderr
