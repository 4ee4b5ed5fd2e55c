"""A damaged or missing file of a run is named, by line where it has lines."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from report.synthetic_run import COLUMNS, make_run
from safetensors.numpy import load_file, save_file

from fastmask.errors import MaskFileError, RunFolderError
from fastmask.report import MaskRow, read_mask_rows, read_rows, read_run, render
from fastmask.report.mask_file import open_mask
from fastmask.report.mask_rows import MASK_COLUMNS


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("folder") / "run", domains=("a", "b"), features=37, seeds=1
    )


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "run"))


def test_reads_what_was_written(run: Path) -> None:
    folder = read_run(run)
    assert len(folder.rows) == 14 and len(folder.masks) == 6
    assert folder.rows[0].key == ("a", "b", "none", "source-end", 0, "")
    assert folder.planned == 14


@pytest.mark.parametrize("name", ["results.csv", "config.json", "environment.json"])
def test_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(RunFolderError, match=name):
        render(run)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere"):
        render(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufffd{}"])
def test_damaged_json_is_named(run: Path, text: str) -> None:
    (run / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"config\.json"):
        read_run(run)


GOOD = "a,b,binary,source-start,0,0.8,0.7,0.6,0.9,"


@pytest.mark.parametrize(
    "line, said",
    [
        ("a,b,binary,source-start,0,0.8,0.7", "line 3: cut off before target_accuracy"),
        ("a,b,binary,source-start,0,0.8,0.7,0.6,nan,", "line 3: source_accuracy_before nan is no"),
        ("a,b,binary,source-start,0,0.8,0.7,1.6,0.9,", "line 3: target_accuracy 1.6 is no share"),
        ("a,b,binary,source-start,0,0.8,x,0.6,0.9,", "line 3: source_accuracy 'x' is no number"),
        ("a,b,binary,source-start,one,0.8,0.7,0.6,0.9,", "line 3: seed 'one' is no whole number"),
        (",b,binary,source-start,0,0.8,0.7,0.6,0.9,", "line 3: source is empty"),
        (
            "a,b,binary,source-start,0,0.8,0.7,0.6,0.9,beta",
            "line 3: setting 'beta' is not of the form",
        ),
        ("a,b,binary,source-start,0,0.8,0.7,0.6,0.9,beta=x", "line 3: setting 'beta=x' is not"),
        ("a,b,binary,source-start,0,0.8,0.7,0.6,0.9,=1", "line 3: setting '=1' is not"),
        (GOOD, "line 3: the run of line 2 again"),
    ],
)
def test_damaged_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"{COLUMNS}\n{GOOD}\n{line}\n")
    with pytest.raises(RunFolderError) as caught:
        read_rows(path)
    assert said in str(caught.value) and "results.csv" in str(caught.value)


MASK_HEAD = (
    "source,strategy,seed,setting,frozen_density,positive_share,source_accuracy,kept_accuracy,"
    "inverted_accuracy"
)
MASK_LINE = "a,binary,0,beta=0.3,0.8,0.7,0.9,0.85,0.2"


def test_mask_table_reads_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "masks.csv"
    path.write_text(f"{MASK_HEAD}\n{MASK_LINE}\na,naive,1,,0.3,,0.9,0.5,0.4\n")
    assert ",".join(MASK_COLUMNS) == MASK_HEAD
    assert tuple(field.name for field in fields(MaskRow)) == MASK_COLUMNS
    assert read_mask_rows(path) == [
        MaskRow("a", "binary", 0, "beta=0.3", 0.8, 0.7, 0.9, 0.85, 0.2),
        MaskRow("a", "naive", 1, "", 0.3, None, 0.9, 0.5, 0.4),
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        ("a,binary,0,,0.8,0.7,0.9", "line 3: cut off before kept_accuracy"),
        ("a,binary,0,,0.8,1.7,0.9,0.85,0.2", "line 3: positive_share 1.7 is no share"),
        ("a,binary,0,,0.8,,0.9,0.85,inf", "line 3: inverted_accuracy inf is no share"),
        ("a,binary,0,,0.8,,,0.85,0.2", "line 3: source_accuracy '' is no number"),
        ("a,binary,,,0.8,,0.9,0.85,0.2", "line 3: seed '' is no whole number"),
        ("a,,0,,0.8,,0.9,0.85,0.2", "line 3: strategy is empty"),
        (MASK_LINE, "line 3: the mask of line 2 again"),
    ],
)
def test_damaged_line_of_the_mask_table_is_named(run: Path, line: str, said: str) -> None:
    (run / "masks.csv").write_text(f"{MASK_HEAD}\n{MASK_LINE}\n{line}\n")
    with pytest.raises(RunFolderError) as caught:
        read_run(run)
    assert said in str(caught.value) and "masks.csv" in str(caught.value)
    (run / "masks.csv").write_text(MASK_HEAD.replace(",seed", "") + "\n")
    with pytest.raises(RunFolderError, match="lacks seed"):
        read_run(run)


def test_header_without_a_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(COLUMNS.replace(",seed", "") + "\n")
    with pytest.raises(RunFolderError, match="lacks seed"):
        read_rows(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_rows(path)


def test_further_columns_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"{COLUMNS},seconds\n{GOOD},12\n")
    assert read_rows(path)[0].source_accuracy == 0.7


def test_a_table_of_a_version_without_settings_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"{COLUMNS.removesuffix(',setting')}\n{GOOD.removesuffix(',')}\n")
    assert read_rows(path)[0].setting == ""
    path.write_text(f"{COLUMNS}\n{GOOD}\n{GOOD}beta=0.3\n")
    assert [row.setting for row in read_rows(path)] == ["", "beta=0.3"]


def test_a_folder_of_a_version_without_the_mask_table_is_read(run: Path) -> None:
    assert len(read_run(run).mask_rows) == 6
    (run / "masks.csv").unlink()
    assert read_run(run).mask_rows == ()


def mask_path(run: Path) -> Path:
    return run / "masks" / "a-binary-seed0.safetensors"


def rewrite(path: Path, drop: str = "", **head: str) -> None:
    tensors = load_file(path)
    tensors.pop(drop, None)
    metadata = {
        "fastmask_format": "1", "source": "a", "strategy": "binary", "seed": "0",
        "shapes": json.dumps({"head.weight": [7, 37]}), "classes": json.dumps(list("abcdefg")),
        **head,
    }  # fmt: skip
    save_file(tensors, path, metadata)


def test_missing_mask_is_named(run: Path) -> None:
    mask_path(run).unlink()
    with pytest.raises(MaskFileError, match=r"a-binary-seed0\.safetensors"):
        render(run)


def test_missing_mask_folder_is_named(run: Path) -> None:
    shutil.rmtree(run / "masks")
    with pytest.raises(RunFolderError, match="masks"):
        render(run)


def test_damaged_masks_are_named(run: Path) -> None:
    path = mask_path(run)
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-8], b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        with pytest.raises(MaskFileError, match=path.name):
            read_run(run)


@pytest.mark.parametrize(
    "drop, head, said",
    [
        ("", {"fastmask_format": "2"}, "another version"),
        ("", {"shapes": "{"}, "metadata"),
        ("", {"shapes": "{}"}, "no masked parameter"),
        ("", {"shapes": '{"head.weight": [-7, -37]}'}, "negative"),
        ("", {"seed": "first"}, "metadata"),
        ("head.weight.frozen", {}, r"head\.weight\.frozen is missing"),
    ],
)
def test_bad_head_of_a_mask_is_named(run: Path, drop: str, head: dict[str, str], said: str) -> None:
    rewrite(mask_path(run), drop, **head)
    with pytest.raises(MaskFileError, match=said):
        open_mask(mask_path(run))


def test_bits_must_fit_the_shape_and_padding_be_clear(run: Path) -> None:
    path = mask_path(run)
    rewrite(path, shapes='{"head.weight": [7, 3700]}')
    with pytest.raises(MaskFileError, match="expected 3240 bytes of uint8"):
        open_mask(path).frozen("head.weight")
    rewrite(path, shapes='{"head.weight": [6, 37]}')
    with pytest.raises(MaskFileError, match="expected"):
        open_mask(path).weight("head.weight")
    tensors = load_file(path)
    tensors["head.weight.frozen"] = np.full_like(tensors["head.weight.frozen"], 255)
    save_file(tensors, path)
    rewrite(path)
    with pytest.raises(MaskFileError, match="beyond entry 259"):
        open_mask(path).frozen("head.weight")


def test_bits_read_back_as_written(run: Path) -> None:
    path = mask_path(run)
    bits = np.random.default_rng(3).random((7, 37)) < 0.5
    tensors = load_file(path)
    packed = np.zeros(40, np.uint8)
    for e in np.flatnonzero(bits):
        packed[e // 8] |= 1 << (e % 8)
    tensors["head.weight.frozen"] = packed
    save_file(tensors, path)
    rewrite(path)
    assert np.array_equal(open_mask(path).frozen("head.weight"), bits)


def test_weights_that_are_not_finite_are_named(run: Path) -> None:
    path = mask_path(run)
    tensors = load_file(path)
    tensors["head.weight.weight"][0, 0] = np.nan
    save_file(tensors, path)
    rewrite(path)
    with pytest.raises(MaskFileError, match="not finite"):
        open_mask(path).weight("head.weight")
