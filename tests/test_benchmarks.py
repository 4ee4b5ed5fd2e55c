"""Benchmarks run, agree before they time, and say a ratio."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_sweep_is_compared_and_timed() -> None:
    program = ROOT / "benchmarks" / "bench_transfer_sweep.py"
    small = ("--features", "24", "--classes", "3", "--repeats", "1")
    done = subprocess.run(
        [sys.executable, program, *small], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "every run's accuracies agree within one test row" in done.stdout
    assert re.search(r"grouped over the loop: \d+\.\d times", done.stdout)
