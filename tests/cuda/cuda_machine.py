"""What the kernels of fastmask._cuda compiled to: `python tests/cuda/cuda_machine.py` prints a table."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture: registers a thread, bytes of memory a thread and a block."""

    op: str
    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int


def module() -> Path | None:
    """The file of fastmask._cuda, without loading it."""
    spec = importlib.util.find_spec("fastmask._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found.exists() else None


def dump(*options: str) -> str:
    """What cuobjdump prints of the module."""
    tool, path = cuobjdump(), module()
    assert tool is not None and path is not None
    return subprocess.run(
        [tool, *options, str(path)], capture_output=True, text=True, check=True
    ).stdout


def kernels() -> list[Kernel]:
    """All kernels of all architectures."""
    found: list[Kernel] = []
    arch = ""
    lines = dump("-res-usage").splitlines()
    for line, behind in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        if match := re.match(r" Function (\w+):", line):
            used = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", behind)}
            op, name = readable(match[1])
            found.append(
                Kernel(op, name, arch, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
            )
    return found


def readable(mangled: str) -> tuple[str, str]:
    """The source's stem, and the kernel with what it is a template of, of a mangled name such as
    _ZN8fastmask39_GLOBAL__N__d355b721_7_pack_cu_e36e14844packIfNS0_5AboveIfEEEEvPKT_T0_lPhl."""
    parts, rest = [], mangled.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    space, room, name = parts
    source = re.fullmatch(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_[0-9a-f]+", room)
    assert space == "fastmask" and source is not None, mangled
    types = {"f": "float32", "h": "bool", "t": "16 bits", "j": "32 bits", "m": "64 bits"}
    of = []
    if given := re.match(r"I(?:([fhtjm])|NS_\d+(b?float16)E)((?:L[ib]\dE)*)", rest):
        values = re.findall(r"L([ib])(\d)E", given[3])
        of = [
            given[2] or types[given[1]],
            *(("no", "yes")[int(v)] if t == "b" else v for t, v in values),
        ]
    return source[1], f"{name}<{', '.join(of)}>" if of else name


def table() -> str:
    """A row a kernel: registers, and shared bytes where there are any, in each architecture."""
    found = kernels()
    archs = sorted({k.arch for k in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    lines = [f"| op | kernel | {' | '.join(archs)} |", "| --- " * (2 + len(archs)) + "|"]
    for op, name in dict.fromkeys((k.op, k.name) for k in found):
        of = {k.arch: k for k in found if (k.op, k.name) == (op, name)}
        cells = [
            f"{k.registers}, {k.shared}" if k.shared else f"{k.registers}"
            for k in map(of.get, archs)
            if k
        ]
        lines.append(f"| `{op}` | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
