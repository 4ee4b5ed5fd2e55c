"""Sweeps over layers of the backbone: the folder they leave, interruptions, threads, the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask.backbones import Backbone
from fastmask.data import DomainSet
from fastmask.errors import DataError
from fastmask.report.mask_file import open_mask
from fastmask.transfer import Config
from fastmask.transfer import run as sweep
from fastmask.transfer.network import pictures

Settings = Callable[..., Config]
LAST, OUTPUT = "backbone.12.weight", "head.output.weight"
SUPPORTED = ("naive", "editor", "binary", "kl", "magnitude", "random")


def rows_of(folder: Path) -> list[str]:
    return (folder / "results.csv").read_text().splitlines()


@pytest.mark.parametrize("policy", ["frozen", "affine"])
def test_a_sweep_leaves_a_run_folder(policy: str, layered: Settings) -> None:
    config = layered(strategies=SUPPORTED, bn_policy=policy, exact_recall=True)
    result = sweep(config)
    assert [row.strategy for row in result.rows] == ["none", "scratch", *SUPPORTED]
    densities = {row.strategy: row.frozen_density for row in result.rows}
    assert densities["none"] == densities["scratch"] == 0
    assert densities["binary"] == pytest.approx(0.55, abs=1 / 30208)
    said = json.loads((result.folder / "environment.json").read_text())
    assert said["masked"] == {"backbone.12": [64, 48, 3, 3], "head.output": [10, 256]}
    assert said["batch_norm"].startswith(f"batch norm, {policy}: 4 norms")
    assert LAST in said["trained_on_the_target"]
    assert "head.output.bias" not in said["trained_on_the_target"]
    for strategy in SUPPORTED:
        mask = open_mask(result.folder / "masks" / f"handwritten-{strategy}-seed0.safetensors")
        assert mask.shapes == {LAST: (64, 48, 3, 3), OUTPUT: (10, 256)}
        assert mask.last == OUTPUT
        share = sum(mask.frozen(name).sum() for name in mask.shapes) / 30208
        assert share == densities[strategy]
    assert len((result.folder / "masks.csv").read_text().splitlines()) == 1 + len(SUPPORTED)


def test_threads_and_interruptions_change_nothing(layered: Settings, tmp_path: Path) -> None:
    given: dict[str, Any] = {"strategies": ("binary",), "targets": ("printed", "neon")}
    whole = sweep(layered(**given, out=tmp_path / "whole"))

    def stop(label: str, done: int, total: int) -> None:
        if label == "fine-tuning on targets" and done == 2:
            raise KeyboardInterrupt

    again = layered(**given, out=tmp_path / "again")
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt, match="2 of 6 runs are kept"):
        sweep(again, stop)
    assert len(rows_of(tmp_path / "again")) == 3
    resumed = sweep(again, resume=True)
    assert resumed.rows == whole.rows
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole")
    file = "masks/handwritten-binary-seed0.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# The pictures.


def test_pictures_are_cut_as_features_are(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    found = pictures.load(layered(holdout=0.25), domains, backbone.transform, lambda x: x, None)
    assert set(found) == {"handwritten", "printed"}
    for name, domain in found.items():
        split = domains.split(name, 0, 0.25)
        for part, rows in ((domain.train, split.train), (domain.test, split.val)):
            assert torch.equal(part.y, domains.labels(name)[rows])
            first = backbone.transform.sized(domains.image(name, int(rows[0])))
            assert part.x.dtype == torch.uint8 and torch.equal(part.x[0], first)


def test_every_picture_that_cannot_be_decoded_is_named(
    layered: Settings, domains: DomainSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = domains._picture

    def damaged(domain: str, row: int) -> torch.Tensor:
        if (domain, row) in (("handwritten", 3), ("printed", 5), ("neon", 7)):
            raise DataError("cannot be decoded")
        return whole(domain, row)

    monkeypatch.setattr(domains, "_picture", damaged)
    with pytest.raises(DataError, match="2 faults") as raised:
        sweep(layered())
    assert "handwritten, picture 3: cannot be decoded" in str(raised.value)
    assert "printed, picture 5: cannot be decoded" in str(raised.value)
