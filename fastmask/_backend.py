"""The only dispatch: which back ends there are, why one is missing, and which module an op runs on.

A back end of an op is the module `fastmask/ops/<op>/<backend>.py`; all back ends of an op have equal
function names. A named back end is used or refused with the reason, never replaced; `auto` passes by one
whose `DTYPES`, where it has them, lack the tensors' dtype, that lacks the function, or that is for few rows
(`MOST_ROWS`, a choice of speed alone) where there are more. `triton` is refused tensors on the CPU unless
TRITON_INTERPRET=1 has Triton interpret its kernels; `auto` never takes it there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from fastmask.errors import BackendUnavailable

BACKENDS: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")

_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_OPS = Path(__file__).parent / "ops"


@functools.cache
def missing(name: str) -> str | None:
    """Say why back end `name` cannot run in this process; None where it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or auto, got {name!r}")
    if name == "reference":
        return None
    if not any(_OPS.glob(f"*/{name}.py")):
        return f"this version of fastmask has no {name} kernels yet"
    if name == "cpu":
        return _missing_engine()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if name == "triton" and interpreted():
        return None
    if name == "triton" and not torch.cuda.is_available():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 (slow, for tests) is not set"
    return _missing_launchers() if name == "cuda" else None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on tensors of any device: how they are tested without a GPU.

    Triton reads the variable when it is imported, so it is set before Python starts.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing_engine() -> str | None:
    """Load the CPU engine with the instruction set that FASTMASK_CPU_ISA names; say why there is none."""
    try:
        from fastmask import _cpu
    except ImportError as error:
        return _not_here("_cpu", error)
    if forced := os.environ.get("FASTMASK_CPU_ISA"):
        _cpu.use(forced)
    if entries := _openmp():
        _cpu.borrow(*entries)
    _cpu.know(torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter))
    return None


def _missing_launchers() -> str | None:
    """Load the CUDA engine; say why it cannot run on the devices there are."""
    try:
        from fastmask import _cuda
    except ImportError as error:
        return _not_here("_cuda", error)
    return _cuda.missing() if torch.cuda.is_available() else "torch sees no CUDA device"


def _not_here(name: str, error: ImportError) -> str:
    """Say that a compiled module is not in this installation, and why where the build left word."""
    said = Path(__file__).with_name(f"{name}_missing.txt")
    why = said.read_text(encoding="utf-8").strip() if said.exists() else error
    return f"the compiled module fastmask.{name} is not in this installation ({why})"


def _openmp() -> tuple[int, int] | None:
    """GOMP_parallel and omp_get_thread_num of the OpenMP runtime that torch is linked to, however named."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        entries = (library.GOMP_parallel, library.omp_get_thread_num)
    except (OSError, AttributeError):
        return None
    parallel, number = (ctypes.cast(entry, ctypes.c_void_p).value for entry in entries)
    return (parallel, number) if parallel and number else None


def preference(device: str) -> tuple[str, ...]:
    """Order in which `auto` tries the back ends for tensors on a device type."""
    return (*(b for b in ("cuda", "triton", "cpu") if _DEVICES[b] == device), "reference")


@functools.cache
def _module(op: str, name: str) -> ModuleType | None:
    """The back end's module of an op, or None where that op has none."""
    if not (_OPS / op / f"{name}.py").exists():
        return None
    return importlib.import_module(f"fastmask.ops.{op}.{name}")


@functools.cache
def _resolve(
    op: str, name: str, device: str, dtype: torch.dtype | None, function: str | None = None
) -> tuple[ModuleType, ...]:
    """The module named, or for auto all that can run, fastest first."""
    if name == "auto":
        present = (_module(op, each) for each in preference(device) if missing(each) is None)
        found = tuple(m for m in present if m is not None and _takes(m, dtype, function))
        if found:
            return found
        raise BackendUnavailable(f"{op}: no back end runs on {device} tensors")
    reason = missing(name)
    module = _module(op, name) if reason is None else None
    if reason is None and module is None:
        reason = f"it has no {op} yet"
    anywhere = name == "triton" and interpreted()
    if reason is None and not anywhere and _DEVICES.get(name, device) != device:
        reason = f"it works on {_DEVICES[name]} tensors and these are on {device}"
    if module is not None and not _takes(module, dtype):
        computes = ", ".join(str(each).removeprefix("torch.") for each in module.DTYPES)
        reason = reason or f"it computes in {computes} and these are {dtype}"
    if module is not None and not _takes(module, None, function):
        reason = reason or f"its {op} has no {function}"
    if reason is not None:
        raise BackendUnavailable(f"{op}: back end {name!r} cannot be used: {reason}")
    assert module is not None
    return (module,)


def _takes(module: ModuleType, dtype: torch.dtype | None, function: str | None = None) -> bool:
    typed = dtype is None or dtype in getattr(module, "DTYPES", (dtype,))
    return typed and (function is None or hasattr(module, function))


def resolve(
    op: str,
    name: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    function: str | None = None,
    rows: int = 0,
) -> ModuleType:
    """Return the module that runs `op` on such tensors: the one named, or for auto the first of `preference`.

    `function` is the one that will be called, where not all back ends have it; `rows` how many there are.

    Raises:
        ValueError: `name` is no back end, or FASTMASK_CPU_ISA names no instruction set of this processor.
        BackendUnavailable: the back end named cannot run; the message says why.
    """
    kind = device if isinstance(device, str) else device.type
    found = _resolve(op, name, kind, dtype, function)
    for module in found if rows else ():
        if rows <= getattr(module, "MOST_ROWS", rows):
            return module
    return found[-1] if rows else found[0]
