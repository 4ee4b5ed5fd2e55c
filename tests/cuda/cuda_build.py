"""Builds fastmask._cuda from its own sources by a C++ compiler, its kernels to run on the CPU."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
HEADER = Path(__file__).parent / "emulated" / "cuda_on_host.h"
# A vector that is loaded from no multiple of its size, or an index out of an array, stops the process.
CHECKED = ("-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", *CHECKED]
ON_HOST = ["-include", str(HEADER), '-DFASTMASK_CUDA_CAPABILITIES="80 90+"', "-x", "c++"]


def build(folder: Path) -> Path:
    """Compile and link the module; return where it is."""
    sources = [SOURCES / "bindings.cpp", *sorted(SOURCES.glob("*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return link(list(pool.map(lambda source: compile_(source, folder), sources)), folder)


def compile_(source: Path, folder: Path) -> Path:
    """Compile one file; return its object."""
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    out = folder / f"{source.stem}.o"
    flags = [*FLAGS, *(ON_HOST if source.suffix == ".cu" else include)]
    subprocess.run(["c++", *flags, "-c", str(source), "-o", str(out)], check=True)
    return out


def link(objects: list[Path], folder: Path) -> Path:
    """Link the module; return where it is."""
    target = folder / "_cuda.so"
    subprocess.run(["c++", "-shared", *map(str, objects), "-o", str(target)], check=True)
    return target
