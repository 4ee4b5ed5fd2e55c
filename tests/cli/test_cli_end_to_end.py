"""The whole command on the embedded digits, with few steps: what it writes is what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

for package in ("sklearn", "matplotlib"):
    pytest.importorskip(package, reason="the digits and their report need the extra `vision`")

FEW = (
    "--seeds", "1", "--source", "handwritten", "--target", "chalk", "--target-steps", "3",
    "--set", "source_steps=3", "--set", "mask_steps=3", "--set", "editor_steps=3",
)  # fmt: skip


def fastmask(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastmask", *arguments],
        capture_output=True, text=True, timeout=300, check=False, cwd=folder,
        env={**os.environ, "FASTMASK_CACHE": str(folder / "cache"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def test_a_run_its_report_and_the_same_again(tmp_path: Path) -> None:
    first = fastmask(tmp_path, "transfer", *FEW, "--out", "first", "--json")
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    # unmasked, scratch, naive, editor, and binary from three starts.
    assert said["runs"] == said["planned_runs"] == 7
    assert (tmp_path / said["report"]).stat().st_size > 100_000
    assert "fine-tuning" in first.stderr and "\x1b" not in first.stderr
    again = fastmask(tmp_path, "transfer", "--config", "first/config.json", "--out", "second", "-q")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "second/report.html\n"
    one, two = tmp_path / "first", tmp_path / "second"
    assert (one / "results.csv").read_bytes() == (two / "results.csv").read_bytes()
    # As tensors: safetensors writes the keys of its header in any order.
    mask = "masks/handwritten-binary-seed0.safetensors"
    tensors, others = load_file(one / mask), load_file(two / mask)
    assert tensors.keys() == others.keys()
    assert all(tensors[key].tobytes() == others[key].tobytes() for key in tensors)
    refused = fastmask(tmp_path, "transfer", *FEW, "--out", "first")
    assert refused.returncode == 2 and "first already holds" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_data_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    result = fastmask(tmp_path, "transfer", "--data", "nowhere", "--out", "run", "--json")
    assert result.returncode == 2 and "nowhere" in result.stderr
    assert result.stdout == "" and not (tmp_path / "run").exists()
