"""A whole sweep on small domains: rows, files, and independence of what else runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmask.data import Features
from fastmask.report import read_rows, read_run
from fastmask.report.rows import COLUMNS
from fastmask.transfer import Config, run

Settings = Callable[..., Config]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_all_of_it(settings: Settings, features: dict[str, Features]) -> None:
    config = settings(seeds=2)
    told: list[tuple[str, int, int]] = []
    result = run(
        config, lambda *said: told.append(said), features=features, classes=("cat", "dog", "owl")
    )
    runs = 6 * 2 * 7
    assert len(result.rows) == runs
    assert (result.folder / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert tuple(read_rows(result.folder / "results.csv")) == result.rows
    assert Config.from_json((result.folder / "config.json").read_text()) == config

    folder = read_run(result.folder)
    assert folder.planned == runs
    assert len(folder.masks) == 3 * 2 * 3
    for (source, strategy, seed), mask in folder.masks.items():
        rows = [
            r for r in result.rows if (r.source, r.strategy, r.seed) == (source, strategy, seed)
        ]
        assert {r.frozen_density for r in rows} == {mask.frozen("output.weight").mean()}
        assert mask.classes == ("cat", "dog", "owl")
    said = folder.environment
    assert said["rows"] == {name: {"train": 30, "test": 15} for name in features}
    assert said["batch_norm"].startswith("frozen") and said["seeds"] == [0, 1]
    assert {"torch", "numpy", "fastmask", "threads", "device"} <= set(said)

    events = [line["event"] for line in lines(result.folder)]
    assert events.count("source") == 6 and events.count("mask") == 18
    assert events.count("run") == runs and events[-1] == "finished"
    assert told[-1] == ("fine-tuning on targets", runs, runs)


def test_rows_say_what_they_should(settings: Settings, features: dict[str, Features]) -> None:
    rows = run(settings(), features=features).rows
    for row in rows:
        assert row.source != row.target
        # Of 15 test rows.
        for share in (row.source_accuracy, row.target_accuracy, row.source_accuracy_before):
            assert round(share * 15) == pytest.approx(share * 15, abs=1e-9)
        if row.strategy in ("none", "scratch"):
            assert row.frozen_density == 0.0
        if row.strategy == "binary":
            assert row.frozen_density == 20 / 36, "floor(0.55 * 36 + 0.5) of 36"
    before = {(r.source, r.source_accuracy_before) for r in rows}
    assert len(before) == 3, "one stage 1 a source and seed"


def test_the_same_seed_gives_the_same_rows(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    first = run(settings(out=tmp_path / "a"), features=features)
    torch.manual_seed(2)
    second = run(settings(out=tmp_path / "b"), features=features)
    assert first.rows == second.rows
    for path in sorted((first.folder / "masks").iterdir()):
        assert path.read_bytes() == (second.folder / "masks" / path.name).read_bytes()
    other = run(settings(out=tmp_path / "c", seed=1), features=features)
    assert [r.source_accuracy for r in other.rows] != [r.source_accuracy for r in first.rows]


def test_a_run_does_not_depend_on_the_others(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    whole = {row.key: row for row in run(settings(seeds=2), features=features).rows}
    turned = dict(reversed(features.items()))
    part = run(
        settings(
            out=tmp_path / "part",
            seed=1,
            sources=("oil",),
            targets=("film", "ink"),
            strategies=("binary",),
            starts=("random",),
        ),
        features=turned,
    ).rows
    assert len(part) == 2 * 3
    for row in part:
        assert whole[row.key] == row


def test_weights_are_those_of_the_row_order_alone(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    # Test rows in another order change no accuracy; training rows in another order change the batches.
    turned = {
        name: Features(given.x, given.y, given.train, given.test.flip(0))
        for name, given in features.items()
    }
    first = run(settings(out=tmp_path / "a"), features=features).rows
    assert run(settings(out=tmp_path / "b"), features=turned).rows == first


@pytest.mark.parametrize(
    "given", [{"hidden": 6}, {"train_unmasked": True, "hidden": 6, "target_lr": 1.0}]
)
def test_other_heads(
    given: dict[str, object], settings: Settings, features: dict[str, Features]
) -> None:
    result = run(settings(strategies=("naive",), **given), features=features)
    mask = read_run(result.folder).masks["ink", "naive", 0]
    assert mask.shapes == {"output.weight": (3, 6)}
    assert len(result.rows) == 6 * 3


def test_held_out_rows_stand_in_for_the_test_part(
    settings: Settings, features: dict[str, Features]
) -> None:
    held = {
        name: Features(f.x, f.y, f.train[6:], torch.empty(0, dtype=torch.int64), f.train[:6])
        for name, f in features.items()
    }
    result = run(settings(holdout=0.2, strategies=("naive",)), features=held)
    for row in result.rows:
        assert round(row.target_accuracy * 6) == pytest.approx(row.target_accuracy * 6, abs=1e-9)
    assert read_run(result.folder).environment["tested_on"].startswith("held out")


def test_a_folder_of_pictures_from_end_to_end(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow: extra vision")
    draws = torch.Generator().manual_seed(0)
    for d, domain in enumerate(("bright", "dark")):
        for c, name in enumerate(("flat", "striped")):
            folder = tmp_path / "data" / domain / name
            folder.mkdir(parents=True)
            for i in range(6):
                picture = torch.randint(60, (32, 32, 3), generator=draws) + 120 * (1 - d)
                picture[:: 1 + c] += 60
                image.fromarray(picture.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    config = Config(
        data=str(tmp_path / "data"),
        backbone="digits_cnn",
        weights="random",
        cache=None,
        out=str(tmp_path / "run"),
        seeds=1,
        source_steps=20,
        mask_steps=5,
        editor_steps=5,
        target_steps=5,
    )
    result = run(config)
    assert len(result.rows) == 2 * 7
    folder = read_run(result.folder)
    assert folder.masks["dark", "binary", 0].classes == ("flat", "striped")
    assert folder.environment["backbone"] == "digits_cnn"
    assert folder.environment["rows"]["dark"] == {"train": 8, "test": 4}


def test_the_number_of_threads_changes_nothing_and_is_left_alone(
    settings: Settings, tmp_path: Path
) -> None:
    draws = torch.Generator().manual_seed(3)
    # Wide enough for torch to deal its sums to several threads, where it may.
    rows, width = 120, 4096
    wide = {
        name: Features(
            torch.rand(rows, width, generator=draws), torch.arange(rows) % 3,
            torch.arange(90), torch.arange(90, rows),
        )
        for name in ("ink", "oil")
    }  # fmt: skip
    before = torch.get_num_threads()
    found, during = [], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            config = settings(out=tmp_path / str(threads), batch=64)
            result = run(config, lambda *_: during.append(torch.get_num_threads()), features=wide)
            assert torch.get_num_threads() == threads
            masks = sorted((result.folder / "masks").iterdir())
            found.append((result.rows, [mask.read_bytes() for mask in masks]))
    finally:
        torch.set_num_threads(before)
    assert set(during) == {1}
    assert found[0] == found[1]
