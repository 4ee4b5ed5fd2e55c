"""What is measured, and on what: the commit, the device, versions, the allocator."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fastmask import __version__, _backend

# glibc's allocator keeps large blocks instead of giving them back: no page is faulted in twice.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@functools.cache
def commit() -> str:
    """The commit measured, with a + where the tree differs from it; the version where there is no tree."""
    root = Path(_backend.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return __version__
    git = ("git", "-C", str(root))
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "csrc", "fastmask/ops"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + "+" * bool(changed.stdout) if head.returncode == 0 else __version__


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the engine's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = named[1] if named else name
    if _backend.missing("cpu") is not None:
        return name
    from fastmask import _cpu

    return f"{name}, {_cpu.isa()}"


def version(package: str) -> str:
    """The version of a package, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tuned() -> bool:
    """Whether this process was started with the tuned allocator."""
    return all(os.environ.get(name) == value for name, value in TUNED.items())


def restart_tuned() -> None:
    """Start this program again with the tuned allocator, which is read before main; does not return."""
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **TUNED})
