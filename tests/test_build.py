"""What is built where there is no compiler, and that no build needs torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def without_a_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is built with no compiler, by a Python that cannot import torch."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    leave = shutil.ignore_patterns("*.so", "*_missing.txt", "__pycache__")
    shutil.copytree(ROOT / "fastmask", source / "fastmask", ignore=leave)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(ROOT / "benchmarks", source / "benchmarks", ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', 'build', '--build-lib', 'out', '--build-temp', 'temp']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    nowhere = {"CXX": "no-such-compiler", "CUDACXX": "no-such-nvcc", "FASTMASK_CUDA_ARCHS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "out"


def run(package: Path, *command: str) -> str:
    # -S: an editable installation's finder would put its own engine in the place of the missing one.
    paths = [str(package), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-S", *command],
        cwd=package,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_is_there_and_says_why_it_has_no_engine(without_a_compiler: Path) -> None:
    assert not list(without_a_compiler.glob("fastmask/*.so"))
    said = run(without_a_compiler, "-m", "fastmask", "info")
    assert "there is no C++ compiler: no-such-compiler was not found" in " ".join(said.split())


def test_it_works_on_the_reference_alone(without_a_compiler: Path) -> None:
    program = """
import torch, fastmask
from fastmask import _backend, ops
from fastmask.optim import MaskedAdamW
assert fastmask.__file__.startswith({folder!r})
assert "no-such-compiler" in _backend.missing("cpu")
layer = fastmask.MaskedLinear(37, 5, mask=fastmask.GumbelMask())
optimizer = MaskedAdamW([layer.mask.logits])
layer(torch.ones(3, 37)).sum().backward()
optimizer.step()
assert int(ops.popcount(ops.pack(torch.ones(70, dtype=torch.bool)))) == 70
try:
    ops.popcount(torch.zeros(8, dtype=torch.uint8), backend="cpu")
except fastmask.errors.BackendUnavailable as error:
    print(error)
"""
    said = run(without_a_compiler, "-c", program.format(folder=str(without_a_compiler)))
    assert "there is no C++ compiler" in said
