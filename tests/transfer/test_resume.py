"""An interrupted sweep goes on where it stopped, and nothing shows that it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask.data import Features
from fastmask.errors import RunFolderError
from fastmask.transfer import Config, run

Settings = Callable[..., Config]
# What of a run folder tells of the results, and nothing of when they came.
_TABLES = ("results.csv", "masks.csv", "config.json")


def results(folder: Path) -> dict[str, Any]:
    """Tables as sets of lines, mask files as bytes."""
    found: dict[str, Any] = {
        name: sorted((folder / name).read_text().replace(str(folder), "").splitlines())
        for name in _TABLES
    }
    found["config.json"] = [line for line in found["config.json"] if '"out"' not in line]
    return found | {path.name: path.read_bytes() for path in (folder / "masks").iterdir()}


def stop_at(done: int) -> Callable[[str, int, int], None]:
    def progress(label: str, so_far: int, total: int) -> None:
        if label == "fine-tuning on targets" and so_far >= done:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def whole(settings: Settings, features: dict[str, Features], tmp_path: Path) -> Path:
    """The sweep as it is when nothing interrupts it."""
    return run(settings(out=tmp_path / "whole", vary=("density=0.3",)), features=features).folder


@pytest.mark.parametrize("done", [0, 16, 32])
def test_after_ctrl_c(
    done: int, whole: Path, settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(vary=("density=0.3",))
    with pytest.raises(KeyboardInterrupt, match=f"{done} of 48 runs"):
        run(config, stop_at(done), features=features)
    result = run(config, features=features, resume=True)
    assert results(result.folder) == results(whole)
    # The rows come back in the order of the plan, whatever the order they were finished in.
    assert len(result.rows) == 48
    events = [
        json.loads(line)["event"]
        for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert events.count("run") == 48 and events.count("resumed") == 1
    assert events.count("interrupted") == 1 and events[-1] == "finished"


def test_finished_runs_are_not_done_again(
    settings: Settings, features: dict[str, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at(28), features=features)
    from fastmask.transfer import stages

    honest, targets = stages.grouped.target.fine_tune, []

    def noted(config: Config, tasks: Any, part: Any) -> Any:
        targets.append(tasks[0][0].target)
        return honest(config, tasks, part)

    monkeypatch.setattr(stages.grouped.target, "fine_tune", noted)
    first = run(config, features=features, resume=True)
    assert targets == ["film"], "two of three targets were finished"
    again = run(config, features=features, resume=True)
    assert targets == ["film"] and again.rows == first.rows


def test_lines_that_were_never_finished_are_cut_off(
    whole: Path, settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(vary=("density=0.3",))
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at(32), features=features)
    folder = Path(config.out)
    for name in ("results.csv", "masks.csv", "metrics.jsonl"):
        path = folder / name
        text = path.read_text()
        path.write_text(text[: len(text) - 9])
    run(config, features=features, resume=True)
    assert results(folder) == results(whole)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tau": 0.5}, "settings differ: tau was 1.0 and is 0.5"),
        ({"vary": ("tau=2",)}, "settings differ: vary was"),
        ({"seeds": 2}, "settings differ: seeds was 1 and is 2"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], said: str, settings: Settings, features: dict[str, Features]
) -> None:
    config = settings()
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at(14), features=features)
    before = results(Path(config.out))
    with pytest.raises(RunFolderError, match=said):
        run(replace(config, **change), features=features, resume=True)
    assert results(Path(config.out)) == before


def test_other_features_are_refused(settings: Settings, features: dict[str, Features]) -> None:
    config = settings()
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at(14), features=features)
    before = results(Path(config.out))
    features["ink"].x[0, 0] += 1
    with pytest.raises(RunFolderError, match="what the sweep rests on differ: data_fingerprint"):
        run(config, features=features, resume=True)
    assert results(Path(config.out)) == before


def test_folders_that_hold_no_sweep_are_refused(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match="run is no folder of a sweep: it has no config.json"):
        run(settings(), features=features, resume=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="config.json: cannot be used"):
        run(settings(), features=features, resume=True)


def test_a_finished_folder_is_refused_without_resume(
    whole: Path, features: dict[str, Features]
) -> None:
    with pytest.raises(
        RunFolderError, match="already holds .* an interrupted sweep is gone on with"
    ):
        run(Config(out=str(whole)), features=features)


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import DOMAINS, domain
from fastmask.transfer import Config, run
config = Config(source_steps=30, mask_steps=12, editor_steps=12, target_steps=int(sys.argv[3]), seeds=3,
                batch=16, out=sys.argv[2])
print("begun", flush=True)
run(config, features={name: domain(seed) for seed, name in enumerate(DOMAINS)}, resume=len(sys.argv) > 4)
"""


def process(folder: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, here, str(folder), str(steps), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, lines: int) -> None:
    until = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") > lines):
        assert time.monotonic() < until, f"{path} never had {lines} lines"
        time.sleep(0.01)


@pytest.mark.slow
def test_after_kill_and_while_another_is_running(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    steps = 400
    config = settings(seeds=3, target_steps=steps)
    killed = process(tmp_path / "run", steps)
    wait_for(tmp_path / "run" / "results.csv", 14)
    # While it runs nobody else may use the folder, to begin or to go on.
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="another sweep is running|already holds"):
            run(config, features=features, resume=resume)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    left = (tmp_path / "run" / "results.csv").read_text().count("\n") - 1
    assert 0 < left < 126, "it was to be killed half way"
    result = run(config, features=features, resume=True)
    unbroken = run(replace(config, out=str(tmp_path / "unbroken")), features=features)
    assert result.rows == unbroken.rows
    assert results(result.folder) == results(unbroken.folder)


def test_results_do_not_depend_on_the_number_of_threads(
    whole: Path, settings: Settings, features: dict[str, Features]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(settings(vary=("density=0.3",)), features=features)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert results(one.folder) == results(whole)
