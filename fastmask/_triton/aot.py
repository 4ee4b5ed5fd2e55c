"""What the kernels compile to, read from their machine code with no GPU: `python -m fastmask._triton.aot`.

Launchers run on small CPU tensors while the launches they make are recorded instead of started; each is then
compiled with the types, constants and options it was made with, so that what is read here is what would run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastmask._triton.cases import Case, cases

CAPABILITIES = (80, 90)

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, its options, and how many programs run along each axis."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What a kernel's machine code takes: registers a thread, bytes of memory, instructions."""

    kernel: str
    capability: int
    registers: int
    shared: int
    stack: int
    spills: int
    tensor_core: tuple[str, ...]
    ptx: str
    sass: str


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect what launchers would start, and start nothing; their outputs hold what memory held."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        given = {name: value for name, value in kwargs.items() if name in names}
        bound = inspect.signature(kernel.fn).bind(*args, **given)
        bound.apply_defaults()
        launches.append(Launch(kernel, dict(bound.arguments), options, grid))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compiled(launch: Launch, capability: int) -> Machine:
    """Compile a launch for a compute capability and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, divisible = _type_of(value, not parameter.do_not_specialize)
        if parameter.is_constexpr or kind is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=launch.options)
    return _read(launch.kernel.__name__, capability, binary)


def _type_of(value: Any, special: bool) -> tuple[str | None, bool]:
    """Triton's name of a value's type (None: a constant) and whether 16 divides it, as Triton specialises."""
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype], special and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int) and not isinstance(value, bool) and (value != 1 or not special):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), special and value % 16 == 0
    return None, False


def _read(name: str, capability: int, binary: Any) -> Machine:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _dump("--dump-resource-usage", cubin)
        sass = _dump("--dump-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Machine(
        kernel=name,
        capability=capability,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=binary.metadata.shared,
        # A value that does not fit in registers is stored to and loaded from local memory.
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        tensor_core=tuple(sorted(set(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|WGMMA)\.[\w.]+", sass)))),
        ptx=binary.asm["ptx"],
        sass=sass,
    )


def _dump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return run.stdout


def launches_of(case: Case) -> list[Launch]:
    """The launches that a case makes."""
    module = importlib.import_module(f"fastmask.ops.{case.op}.triton")
    with recorded() as launches:
        getattr(module, case.launcher)(*case.arguments)
    return launches


def widened(launch: Launch) -> Launch:
    """The same launch over more than 2^32 elements, whose offsets take 64 bits."""
    large = {"WIDE": True, "n": 2**33, "size": 2**30}
    return Launch(launch.kernel, {**launch.arguments, **large}, launch.options)


def main() -> None:
    """Print a table: one line for each kernel, case and compute capability."""
    print("| op | case | kernel | sm | registers | shared | stack | spills | tensor cores |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases():
        for launch in launches_of(case):
            for capability in CAPABILITIES:
                m = compiled(launch, capability)
                cores = ", ".join(f"`{each}`" for each in m.tensor_core) or "-"
                print(
                    f"| {case.op} | {case.what} | `{m.kernel}` | {capability} | {m.registers} | {m.shared} "
                    f"| {m.stack} | {m.spills} | {cores} |"
                )


if __name__ == "__main__":
    main()
