"""Bad input and interrupted work: named errors, and nothing finished is lost."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask.data import Features
from fastmask.errors import DataError, RunFolderError, TrainingDiverged
from fastmask.report import read_rows
from fastmask.transfer import Config, records, run, stages, sweep

Settings = Callable[..., Config]


def spoil(features: dict[str, Features], name: str, **change: Any) -> dict[str, Features]:
    return {**features, name: dataclasses.replace(features[name], **change)}


def nan_at(x: torch.Tensor, row: int) -> torch.Tensor:
    spoiled = x.clone()
    spoiled[row, 3] = float("nan")
    return spoiled


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: {"x": nan_at(f.x, 7)},
            "oil: 1 of 45 rows of features are not finite, first row 7",
        ),
        (lambda f: {"x": f.x[:, :5]}, "oil: expected 12 features as in the first domain, got 5"),
        (lambda f: {"y": f.y[:-1]}, r"oil: expected x \(n, K\) and y \(n,\)"),
        (lambda f: {"y": f.y - 1}, r"oil: expected labels in \[0, 3\), got -1 to 1"),
        (lambda f: {"train": f.train[f.y[f.train] != 2]}, "oil: no training rows of class owl"),
        (lambda f: {"test": f.test[:0]}, "oil: its test part has no rows"),
        (lambda f: {"test": f.test + 45}, r"oil: test rows: expected indices in \[0, 45\)"),
    ],
)
def test_features_that_cannot_be_used(
    change: Callable[[Features], dict[str, Any]],
    message: str,
    settings: Settings,
    features: dict[str, Features],
) -> None:
    config = settings()
    bad = spoil(features, "oil", **change(features["oil"]))
    with pytest.raises(DataError, match=message):
        run(config, features=bad, classes=("cat", "dog", "owl"))
    assert not Path(config.out).exists(), "a sweep that never began leaves its folder free"
    run(settings(strategies=("naive",)), features=features)


@pytest.mark.parametrize(
    "change",
    [lambda f: {"x": f.x.double()}, lambda f: {"y": f.y.int()}, lambda f: {"y": f.y.float()}],
)
def test_features_of_another_dtype(
    change: Callable[[Features], dict[str, Any]], settings: Settings, features: dict[str, Features]
) -> None:
    with pytest.raises(TypeError, match="oil: expected x float32 and y int64"):
        run(settings(), features=spoil(features, "oil", **change(features["oil"])))


def test_one_domain_is_refused(settings: Settings, features: dict[str, Features]) -> None:
    with pytest.raises(DataError, match="at least two domains"):
        run(settings(), features={"ink": features["ink"]})


def test_unknown_domains_and_devices(settings: Settings, features: dict[str, Features]) -> None:
    with pytest.raises(ValueError, match="targets: expected one of ink, oil, film, got 'clay'"):
        run(settings(targets=("clay",)), features=features)
    with pytest.raises(ValueError, match="device: expected one that works here, got 'abacus'"):
        run(settings(device="abacus"), features=features)
    with pytest.raises(ValueError, match="classes"):
        run(settings(), classes=("cat",))


def test_fewer_rows_than_masks_a_batch(settings: Settings, features: dict[str, Features]) -> None:
    few = spoil(features, "ink", train=torch.tensor([0, 1, 2]))
    with pytest.raises(
        ValueError, match="samples: expected at most the 3 training rows of ink, got 4"
    ):
        run(settings(), features=few)


def test_a_folder_that_holds_something_is_refused(
    settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(strategies=("naive",))
    run(config, features=features)
    kept = (Path(config.out) / "results.csv").read_bytes()
    with pytest.raises(RunFolderError, match="already holds config.json.*new or empty"):
        run(config, features=features)
    assert (Path(config.out) / "results.csv").read_bytes() == kept


def test_an_empty_folder_is_taken(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = run(settings(out=tmp_path / "empty", strategies=("naive",)), features=features)
    assert result.folder == tmp_path / "empty"
    assert len(result.rows) == 6 * 3


def test_an_unwritable_folder_is_named_before_any_work(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(sweep.data, "load", never)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match="out: .*file/run cannot be written to"):
        run(settings(out=tmp_path / "file" / "run"))


def test_a_disk_that_fills_up(
    settings: Settings, features: dict[str, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    def fill(label: str, done: int, total: int) -> None:
        if label == "fine-tuning on targets" and done == 8:
            monkeypatch.setattr(records.os, "fsync", full)

    config = settings(strategies=())
    with pytest.raises(RunFolderError, match="results.csv: cannot be written .*No space left"):
        run(config, fill, features=features)
    monkeypatch.undo()
    assert len(read_rows(Path(config.out) / "results.csv")) >= 8


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_divergence_keeps_the_groups_before_it(
    engine: str,
    settings: Settings,
    features: dict[str, Features],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage: Any = stages.stage_3 if engine == "loop" else stages.grouped.target
    honest = stage.fine_tune

    def sometimes(config: Config, *given: Any) -> Any:
        of_it = given[1] if engine == "loop" else given[0][0][0]
        if of_it.target == "film":
            config = dataclasses.replace(config, target_lr=1e30, target_weight_decay=1.0)
        return honest(config, *given)

    config = settings(engine=engine)
    monkeypatch.setattr(stage, "fine_tune", sometimes)
    with pytest.raises(
        TrainingDiverged, match=r"^run \w+ -> film, \w+ from [\w-]+, seed 0: the loss is"
    ):
        run(config, features=features)
    folder = Path(config.out)
    assert {row.target for row in read_rows(folder / "results.csv")} == {"ink", "oil"}
    assert len(read_rows(folder / "results.csv")) == 28
    assert len(list((folder / "masks").iterdir())) == 9
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed" and last["runs"] == 28 and "TrainingDiverged" in last["error"]


def test_ctrl_c_keeps_what_is_finished(settings: Settings, features: dict[str, Features]) -> None:
    def impatient(label: str, done: int, total: int) -> None:
        if label == "fine-tuning on targets" and done == 14:
            raise KeyboardInterrupt

    config = settings()
    with pytest.raises(KeyboardInterrupt, match="14 of 42 runs are kept in"):
        run(config, impatient, features=features)
    folder = Path(config.out)
    rows = read_rows(folder / "results.csv")
    assert len(rows) == 14 and len(list((folder / "masks").iterdir())) == 9
    events = [
        json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert events.count("run") == 14 and events[-1] == "interrupted"


def test_a_mask_that_freezes_nothing_is_named_and_the_sweep_goes_on(
    settings: Settings, features: dict[str, Features]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = run(settings(editor_k=50.0, strategies=("editor",)), features=features).rows
    said = [str(w.message) for w in caught]
    assert sum("nothing is frozen" in text for text in said) == 3
    assert {row.frozen_density for row in rows} == {0.0} and len(rows) == 18
