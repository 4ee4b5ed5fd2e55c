"""Knobs that vary, layers, and sweeps that go on, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastmask import transfer
from fastmask.cli.app import app
from fastmask.transfer import Config, variations

Study = Callable[..., Result]


@pytest.fixture
def asked() -> list[tuple[Config, bool]]:
    return []


@pytest.fixture
def study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[tuple[Config, bool]]
) -> Study:
    """The command with a study that notes what it was asked for and leaves an unfinished folder."""
    monkeypatch.chdir(tmp_path)

    def run(config: Config, progress: Any = None, resume: bool = False) -> None:
        asked.append((config, resume))
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json())
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "run", run)
    return lambda *arguments: CliRunner().invoke(app, ["transfer", *arguments])


def test_knobs_layers_and_policy_reach_the_library(
    study: Study, asked: list[tuple[Config, bool]]
) -> None:
    study(
        "--no-report", "--vary", "beta=0.1,1", "--vary", "tau=2", "--layers", "conv*",
        "--policy", "affine", "--engine", "loop",
    )  # fmt: skip
    ((config, resume),) = asked
    assert config.vary == ("beta=0.1,1", "tau=2") and not resume
    assert (config.layers, config.bn_policy, config.engine) == (("conv*",), "affine", "loop")


def test_curves_vary_every_knob_that_its_strategies_have(
    study: Study, asked: list[tuple[Config, bool]]
) -> None:
    study("--no-report", "--curves")
    study("--no-report", "--curves", "--strategy", "naive")
    study("--no-report", "--curves", "--vary", "density=0.5", "--strategy", "binary")
    configs = [config for config, _ in asked]
    assert configs[0].vary == variations.CURVES
    assert [text.partition("=")[0] for text in configs[1].vary] == ["naive_k"]
    assert [text.partition("=")[0] for text in configs[2].vary] == ["density", "beta", "tau"]
    assert configs[2].vary[0] == "density=0.5"


def test_resume_goes_on_with_the_settings_of_the_folder(
    study: Study, asked: list[tuple[Config, bool]]
) -> None:
    study("--no-report", "--out", "first", "--tau", "0.5")
    result = study("--no-report", "--resume", "first")
    assert result.exit_code == 130
    (begun, fresh), (again, resumed) = asked
    assert (fresh, resumed) == (False, True) and again == begun


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--resume", "nowhere"), "no folder of a sweep"),
        (("--resume", "first", "--tau", "1"), "expected no other setting, got --tau"),
        (("--resume", "first", "--out", "x"), "expected no other setting, got --out"),
        (("--resume", "first", "--curves"), "expected no other setting, got --curves"),
        (("--vary", "target_lr=1,2"), "vary: expected NAME=V1,V2,... with NAME of beta, density"),
        (("--vary", "beta=a"), "vary: expected numbers after beta="),
        (("--vary", "tau=1,1.0"), "vary: expected each value of tau once"),
        (("--vary", "tau=0"), "tau: expected a finite number and above 0"),
        (("--vary", "naive_k=1", "--strategy", "binary"), "naive_k is no knob of binary"),
        (("--policy", "shared"), "bn_policy: expected frozen without layers"),
        (("--engine", "fast"), "engine: expected grouped, loop"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    study: Study, asked: list[tuple[Config, bool]], arguments: tuple[str, ...], said: str
) -> None:
    study("--no-report", "--out", "first")
    asked.clear()
    result = study("--no-report", *arguments)
    assert result.exit_code == 2 and not asked, result.output
    assert said in " ".join(result.stderr.split())


def test_help_has_an_example_of_each(study: Study) -> None:
    text = study("--help").output
    for option in ("--hidden 1024", "--layers", "--policy affine", "--curves", "--resume runs/"):
        assert f"fastmask transfer {option}" in text or option in text
    assert "fastmask transfer --layers" in text and "fastmask transfer --hidden" in text


def test_a_damaged_config_is_named(study: Study, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"tau": -1}))
    result = study("--resume", "run", "--no-report")
    assert result.exit_code == 2 and "config.json cannot be used (tau: expected" in result.stderr
