"""`fastmask transfer` and `report`: what is asked reaches the library, what comes back is said well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from report.synthetic_run import make_run
from typer.testing import CliRunner, Result

from fastmask import errors, report, transfer
from fastmask.cli import summary
from fastmask.cli.app import app
from fastmask.cli.transfer import FIELDS
from fastmask.transfer import Config

pytest.importorskip("matplotlib", reason="the report needs the extra `report`")

runner = CliRunner()
Study = Callable[..., Result]


@pytest.fixture
def asked() -> list[Config]:
    return []


@pytest.fixture
def study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[Config]
) -> Callable[..., Result]:
    """The command with a study that writes a small run folder at once, or raises `fault` half way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: str, fault: BaseException | None = None, keep: float = 1.0) -> Result:
        def run(config: Config, progress: Any = None, resume: bool = False) -> None:
            asked.append(config)
            for done in range(4):
                progress("runs", done, 3)
            if keep:
                make_run(
                    Path(config.out), domains=("a", "b"), features=16, seeds=2, keep=keep,
                    starts=("source-start",),
                )  # fmt: skip
            if fault is not None:
                raise fault

        monkeypatch.setattr(transfer, "run", run)
        return runner.invoke(app, ["transfer", *arguments])

    return invoke


def test_every_option_sets_a_field_there_is() -> None:
    assert set(FIELDS.values()) <= {field.name for field in fields(Config)}
    assert len(set(FIELDS.values())) == len(FIELDS)


def test_nothing_given_is_the_library_s_default(study: Study, asked: list[Config]) -> None:
    result = study("--no-report")
    assert result.exit_code == 0, result.output
    (config,) = asked
    assert config == Config(out=config.out)
    assert Path(config.out).parent == Path("runs") and "digits-" in config.out


def test_options_reach_the_library(study: Study, asked: list[Config], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    result = study(
        "--data", "images", "--splits", "lists", "--backbone", "resnet18", "--weights", "w.pth",
        "--cache", "none", "--source", "photo", "--source", "sketch", "--target", "cartoon",
        "--strategy", "binary", "--start", "random", "--seeds", "2", "--seed", "7", "--tau", "0.5",
        "--samples", "2", "--beta", "0", "--density", "none", "--hidden", "0", "--train-unmasked",
        "--exact-recall", "--device", "cpu", "--out", "there", "--set", "mask_steps=9",
        "--set", "editor_preserve=kl", "--no-report",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert asked == [
        Config(
            data="images", splits="lists", backbone="resnet18", weights="w.pth", cache=None,
            sources=("photo", "sketch"), targets=("cartoon",), strategies=("binary",),
            starts=("random",), seeds=2, seed=7, tau=0.5, samples=2, beta=0.0, density=None,
            hidden=0, train_unmasked=True, exact_recall=True, device="cpu", out="there",
            mask_steps=9, editor_preserve="kl",
        )
    ]  # fmt: skip


def test_earlier_settings_with_one_changed(
    study: Study, asked: list[Config], tmp_path: Path
) -> None:
    earlier = Config(tau=2.0, hidden=32, sources=("a",), out="old")
    (tmp_path / "config.json").write_text(earlier.to_json())
    assert study("--config", "config.json", "--tau", "0.5", "--no-report").exit_code == 0
    (config,) = asked
    assert config == Config(tau=0.5, hidden=32, sources=("a",), out=config.out)
    assert config.out != "old"


def test_summary_names_the_report_and_the_finding(study: Study, tmp_path: Path) -> None:
    result = study("--out", "run")
    assert result.exit_code == 0, result.output
    assert "report: run/report.html" in result.stdout
    assert (tmp_path / "run" / "report.html").exists()
    assert "source gain" in result.stdout and "Compared with unmasked" in result.stdout
    # Progress belongs to the error stream, and without a terminal it has no escape codes.
    assert "runs: 3/3 done" in result.stderr and "runs:" not in result.stdout
    assert "\x1b" not in result.output


def test_json_is_json_and_nothing_else(study: Study) -> None:
    result = study("--out", "run", "--json")
    said = json.loads(result.stdout)
    assert said["run"] == "run" and said["report"] == "run/report.html"
    assert said["runs"] == said["planned_runs"] == 20
    names = [line["strategy"] for line in said["strategies"]]
    assert names == ["none", "naive", "editor", "binary", "scratch"]
    assert said["table_1"][-1]["source"] == "mean"
    assert set(said["table_1"][0]["source_gain"]) == {"mean", "std", "n", "ci95", "within_noise"}


def test_quiet_prints_the_path_alone(study: Study) -> None:
    result = study("--out", "run", "--quiet")
    assert (result.stdout, result.stderr) == ("run/report.html\n", "")
    result = study("--out", "bare", "--quiet", "--no-report")
    assert (result.stdout, result.stderr) == ("bare\n", "")
    assert not Path("bare/report.html").exists()
    assert (
        json.loads(study("--out", "both", "--quiet", "--json", "--no-report").stdout)["runs"] == 20
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--tau", "0"), "tau: expected"),
        (("--tau", "nan"), "tau: expected"),
        (("--seeds", "0"), "seeds: expected at least 1, got 0"),
        (("--samples", "3"), "samples: expected a divisor"),
        (("--strategy", "best"), "magnitude, random, got 'best'"),
        (("--start", "end"), "starts: expected"),
        (("--source", "a", "--target", "a"), "targets: expected a domain other than the source"),
        (("--density", "half"), "--density: expected a number or none, got 'half'"),
        (("--density", "1.5"), "density: expected"),
        (("--set", "mask_steps"), "--set: expected NAME=VALUE"),
        (("--set", "maks_steps=1"), "unknown field maks_steps"),
        (("--set", "mask_steps=many"), "mask_steps: expected a whole number, got 'many'"),
        (("--config", "nowhere.json"), "nowhere.json: cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    study: Study, asked: list[Config], arguments: tuple[str, ...], said: str
) -> None:
    result = study(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert "Traceback" not in result.output and result.stdout == "" and not asked


@pytest.mark.parametrize("arguments", [("--nonsense",), ("--seeds", "many"), ("surplus",)])
def test_what_the_parser_refuses_exits_with_2(study: Study, arguments: tuple[str, ...]) -> None:
    assert study(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "fault, code",
    [
        (errors.DataError("photo/dog/1.jpg: no image"), 2),
        (errors.WeightsError("w.pth: a pickle"), 2),
        (errors.MissingPackage("timm is needed; pip install 'fastmask[vision]'"), 2),
        (errors.RunFolderError("out: cannot be written"), 2),
        (errors.TrainingDiverged("loss is NaN in step 3"), 1),
        (errors.FrozenEntriesMoved("3 entries"), 1),
        (RuntimeError("CUDA out of memory"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_errors_of_the_library_are_sentences(study: Study, fault: Exception, code: int) -> None:
    result = study("--out", "run", fault=fault, keep=0)
    assert result.exit_code == code, result.output
    assert str(fault) in result.stderr and "Traceback" not in result.output


def test_a_fault_half_way_says_what_is_kept(study: Study) -> None:
    result = study("--out", "run", fault=ValueError("later"), keep=0.5)
    assert result.exit_code == 1
    assert "later" in result.stderr
    assert "10 finished runs are kept in run/results.csv" in result.stderr
    assert "fastmask report run" in result.stderr
    drawn = runner.invoke(app, ["report", "run"])
    assert drawn.exit_code == 0 and drawn.stdout == "run/report.html\n"
    assert "10 of 20 runs" in Path("run/report.html").read_text()


def test_a_report_that_cannot_be_drawn_keeps_the_runs(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise errors.RunFolderError("report.html: cannot be written")

    monkeypatch.setattr(report, "render", broken)
    result = study("--out", "run")
    assert result.exit_code == 1 and result.stdout == ""
    assert "report.html: cannot be written" in result.stderr
    assert "20 finished runs are kept" in result.stderr


def test_debug_shows_the_traceback(study: Study) -> None:
    result = study("--out", "run", "--debug", fault=RuntimeError("boom"), keep=0)
    assert result.exit_code == 1 and "Traceback" in result.stderr and "boom" in result.stderr


@pytest.mark.parametrize("keep, said", [(0, "no run had finished"), (0.5, "10 finished runs")])
def test_ctrl_c_says_what_is_kept_and_exits_with_130(study: Study, keep: float, said: str) -> None:
    result = study("--out", "run", fault=KeyboardInterrupt(), keep=keep)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted: ") and said in result.stderr
    assert result.stdout == ""


def test_a_missing_matplotlib_is_said_before_the_work(
    study: Study, asked: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = study("--out", "run")
    assert result.exit_code == 2 and "pip install 'fastmask[report]'" in result.stderr
    assert "--no-report" in result.stderr and not asked
    assert study("--out", "run", "--no-report").exit_code == 0


def test_report_names_what_is_missing(tmp_path: Path) -> None:
    result = runner.invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "nowhere: no such folder" in result.stderr
    run = make_run(tmp_path / "run", domains=("a", "b"), features=16, seeds=1)
    next((run / "masks").glob("a-binary*")).write_bytes(b"")
    result = runner.invoke(app, ["report", str(run)])
    assert result.exit_code == 2 and "a-binary-seed0.safetensors" in result.stderr


def test_help_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = runner.invoke(app, ["transfer", "--help"]).output
    for option in FIELDS:
        assert f"--{option.replace('_', '-')}" in text
    default = Config()
    assert f"[default: {default.seeds}]" in text and f"[default: {default.tau}]" in text
    assert "Examples" in text and "What to run on" in text


def test_a_process_of_its_own_says_its_version() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastmask", "--version"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert run.stdout.strip().count(".") == 2


def test_the_summary_says_counts_and_the_batch_norm_policy() -> None:
    rows = {"ink": {"train": 30, "test": 15}, "oil": {"train": 20, "test": 10}}
    said = summary.circumstances({"rows": rows, "classes": ["a", "b"], "batch_norm": "frozen"})
    assert said == [
        "images, training + test, of 2 classes: ink 30 + 15, oil 20 + 10",
        "batch norm: frozen",
    ]
    assert summary.circumstances({}) == []
