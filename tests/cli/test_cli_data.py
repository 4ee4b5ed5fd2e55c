"""`fastmask data check`: what the library finds is shown whole, and the exit code is its verdict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fastmask import data
from fastmask.cli.app import app

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two domains of two classes of 17 pictures, five of which are tested on."""
    drawn = np.random.default_rng(0)
    for place in ("art/cat", "art/dog", "photo/cat", "photo/dog"):
        (tmp_path / "set" / place).mkdir(parents=True)
        for i in range(17):
            pixels = drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / place / f"p{i:02}.png")
    return tmp_path / "set"


def invoke(*arguments: object) -> Result:
    return runner.invoke(
        app, ["data", "check", *(str(a) for a in arguments)], env={"COLUMNS": "80"}
    )


def test_a_good_folder_exits_0_with_a_table(folder: Path) -> None:
    result = invoke(folder)
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines() if "17" in line] == [
        ["cat", "17", "17"],
        ["dog", "17", "17"],
    ]
    assert (
        "0 errors, 0 warnings: 68 pictures of 2 classes in 2 domains can be used" in result.stdout
    )
    assert "reading pictures: 68/68 done" in result.stderr


def test_warnings_exit_0_and_say_what_becomes_of_it(folder: Path) -> None:
    (folder / "art/cat/p00.png").rename(folder / "art/cat/p00.jpg")
    result = invoke(folder, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    assert "warning: names whose ending is of another format (1)" in result.stdout
    assert "read by their content" in result.stdout and "art/cat/p00.jpg: is PNG" in result.stdout


def test_errors_exit_2_and_ten_places_of_each_are_named(folder: Path) -> None:
    for i in range(13):
        (folder / "art/dog" / f"p{i:02}.png").write_bytes(b"")
    (folder / "photo/elk").mkdir()
    result = invoke(folder)
    assert result.exit_code == 2
    assert "error: empty files (13)" in result.stdout
    assert (
        result.stdout.count(".png: empty file") == 10
        and "and 3 more; --json names all" in result.stdout
    )
    assert "art: 1 of 3 classes missing: elk" in result.stdout
    assert "3 errors, 0 warnings: a run would stop at the errors" in result.stdout
    (elk,) = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("elk")]
    assert elk == ["elk", "none", "0"]


def test_json_holds_every_place_and_nothing_else(folder: Path) -> None:
    for i in range(13):
        (folder / "art/dog" / f"p{i:02}.png").write_bytes(b"")
    result = invoke(folder, "--json")
    assert result.exit_code == 2 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["ok"] is False and found["counts"]["art"] == {"cat": 17, "dog": 4}
    (empty,) = [f for f in found["findings"] if f["kind"] == "empty"]
    assert [p["path"] for p in empty["places"]] == [f"art/dog/p{i:02}.png" for i in range(13)]
    assert [f["kind"] for f in found["findings"]] == [f.kind for f in data.check(folder).findings]


def test_lists_are_checked_with_splits(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    result = invoke(folder, "--splits", tmp_path / "lists")
    assert result.exit_code == 2
    assert "error: split files that do not fit the folder (4)" in result.stdout
    assert "art: no art_train_kfold.txt and no art_train.txt" in result.stdout


def test_names_that_a_terminal_cannot_show_are_escaped(folder: Path) -> None:
    (folder / "art/cat/p00.png").rename(folder / "art/cat/p\x1b[2J.png")
    result = invoke(folder)
    assert result.exit_code == 0 and "\x1b[2J" not in result.stdout
    assert "art/cat/p\\x1b[2J.png" in result.stdout


def test_more_classes_than_rows_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmask.cli.data.ROWS", 1)
    assert "and 1 more" in invoke(folder).stdout


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nowhere")
    assert result.exit_code == 2 and "there is no such folder" in " ".join(result.stderr.split())


def test_help_has_examples_and_the_group_is_listed() -> None:
    said = invoke("--help").stdout
    assert "fastmask data check PACS" in said and "--splits" in said
    assert "data" in runner.invoke(app, ["--help"]).stdout
