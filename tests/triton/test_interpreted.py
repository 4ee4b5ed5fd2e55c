"""The kernels in Triton's interpreter, each file in a process of its own.

Triton decides at its import whether it interprets, and torch may import it at any time: the variable is set
before Python starts, so that no other test sees it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent / "interpreted"


def _why_not() -> str | None:
    """Why the interpreter cannot run kernels here, None where it can."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    made, array = (
        tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
        for name in ("triton", "numpy")
    )
    if made < (3, 7) and array >= (2, 4):
        # It makes a number of an array of one element, which numpy refuses from then on.
        return (
            "the interpreter of triton before 3.7 cannot loop to a bound under numpy 2.4 and newer"
        )
    return None


@pytest.mark.skipif(bool(_why_not()), reason=str(_why_not()))
@pytest.mark.parametrize("path", sorted(ROOM.glob("test_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(path),
        ],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOM.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-8000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout, run.stdout[-2000:]
