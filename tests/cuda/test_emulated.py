"""The CUDA kernels' own sources on the CPU, in a process of their own; faults in them are seen there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build as build
import pytest

ROOM = Path(__file__).parent / "emulated"


def _why_not() -> str | None:
    """Why the sources cannot be built for the CPU here, None where they can."""
    if sys.platform != "linux":
        return "the emulation is written for Linux"
    if shutil.which("c++") is None:
        return "there is no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=str(_why_not()))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("emulated"))


def run(module: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = (
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "cuda_emulated",
        "--tb=short",
    )
    paths = [str(ROOM.parents[2]), str(ROOM.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *arguments],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "PYTHONPATH": os.pathsep.join(paths),
            "FASTMASK_CUDA_EMULATED": str(module),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=ROOM.parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_on_the_cpu(module: Path) -> None:
    found = run(module, str(ROOM))
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


def test_the_tests_of_the_ops(module: Path) -> None:
    """Those that a device would run: of each op with a `cuda.py`, where `auto` takes it.

    Not what ops refuse, as the back ends of the CPU alone compare the number of compressed values, nor
    compact state, which they alone take.
    """
    left = ("avx", "portable", "compile", "opcheck", "refuses", "compact")
    selected = " and ".join(f"not {name}" for name in left)
    ops = sorted(path.parent.name for path in (ROOM.parents[2] / "fastmask/ops").glob("*/cuda.py"))
    files = [str(ROOM.parents[1] / "ops" / f"test_{op}.py") for op in ops]
    found = run(module, "-k", selected, *files, FASTMASK_CUDA_AUTO="1")
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert f"resolved to cuda: {' '.join(ops)}\n" in found.stdout, found.stdout[-500:]


BARRIER = "  __syncthreads();\n"
FAULTS = [
    ("popcount", BARRIER, "", "bits", "ones"),
    ("popcount", "tail + threadIdx.x < bytes", "tail + threadIdx.x <= bytes", "bits", "ones"),
    ("masked_linear", BARRIER, "", "linear", "masked_linear"),
    ("compressed_linear", "      wait_copies<1>();\n", "", "linear", "compressed_linear"),
    ("compressed_linear", "    __syncwarp();\n#pragma", "#pragma", "linear", "compressed_linear"),
    ("masked_sgd_", "bool aligned = ", "bool aligned = true || ", "lists", "sgd"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "old", "new", "file", "tests"), FAULTS)
def test_a_fault_is_seen(
    source: str, old: str, new: str, file: str, tests: str, module: Path, tmp_path: Path
) -> None:
    """A barrier that is missing, a wait, an element too many, a load off alignment: each fails a test."""
    text = (build.SOURCES / f"{source}.cu").read_text()
    assert old in text
    for path in build.SOURCES.glob("*.h"):
        shutil.copy(path, tmp_path)
    (tmp_path / f"{source}.cu").write_text(text.replace(old, new))
    changed = build.compile_(tmp_path / f"{source}.cu", tmp_path)
    others = [path for path in module.parent.glob("*.o") if path.stem != source]
    broken = build.link([changed, *others], tmp_path)
    found = run(broken, str(ROOM / f"test_emulated_{file}.py"), "-k", tests)
    # 1: a test failed; negative: the process was stopped by what it did.
    assert found.returncode == 1 or found.returncode < 0, found.stdout[-2000:]
