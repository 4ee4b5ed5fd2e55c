"""Mask files: what is in them, and the way back to the source model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastmask.bits import BitMask
from fastmask.data import Features
from fastmask.errors import MaskFileError
from fastmask.transfer import Config, mask_files, recall
from fastmask.transfer import source as stage_1
from fastmask.transfer import target as stage_3
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED, Head
from fastmask.transfer.plan import Run
from fastmask.transfer.source import Source, values
from fastmask.transfer.strategies import Found, binary, naive

Settings = Callable[..., Config]
CLASSES = ("cat", "dog", "owl")


def part_of(given: Features) -> Part:
    return Part(given.x[given.train], given.y[given.train])


def learned(
    config: Config, features: dict[str, Features], path: Path
) -> tuple[Source, Found, Head]:
    """A source, its binary mask written to `path`, and the head after a target."""
    part = part_of(features["ink"])
    source = stage_1.train(config, "ink", part, 3, 0)
    found = binary.find(config, source, part)
    mask_files.write(
        path,
        source,
        "binary",
        found,
        CLASSES,
        exact_recall=config.exact_recall,
        train_unmasked=config.train_unmasked,
    )
    run = Run("ink", "oil", "binary", "source-start", 0)
    head, _ = stage_3.fine_tune(config, source, run, part_of(features["oil"]), found.frozen)
    return source, found, head


def test_a_file_holds_what_the_design_says(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    path = tmp_path / "mask.safetensors"
    source, found, _ = learned(settings(), features, path)
    held = load_file(path)
    assert set(held) == {f"{MASKED}.{kind}" for kind in ("frozen", "weight", "initial", "scores")}
    assert BitMask(held[f"{MASKED}.frozen"], (3, 12)) == found.frozen
    assert held[f"{MASKED}.weight"].equal(source.trained[MASKED])
    assert held[f"{MASKED}.initial"].equal(source.initial[MASKED])
    assert found.scores is not None and held[f"{MASKED}.scores"].equal(found.scores)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    assert said == {
        "fastmask_format": "1",
        "source": "ink",
        "strategy": "binary",
        "seed": "0",
        "shapes": '{"output.weight": [3, 12]}',
        "density": repr(20 / 36),
        "classes": '["cat", "dog", "owl"]',
    }


@pytest.mark.parametrize(
    "given", [{}, {"hidden": 5}, {"hidden": 5, "train_unmasked": True, "target_lr": 1.0}]
)
def test_the_source_model_comes_back_bit_for_bit(
    given: dict[str, object], settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    path = tmp_path / "mask.safetensors"
    config = settings(exact_recall=True, **given)
    source, _, head = learned(config, features, path)
    assert not head.output.weight.equal(source.trained[MASKED])
    recall(path, head)
    for name, value in values(head).items():
        assert value.view(torch.int32).equal(source.trained[name].view(torch.int32)), name


def test_recall_refuses_what_it_cannot_bring_back(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    path = tmp_path / "mask.safetensors"
    _, found, head = learned(settings(exact_recall=True), features, path)
    before = values(head)

    moved = stage_1.with_values(head, before)
    with torch.no_grad():
        moved.output.weight[found.frozen.to_bool()] += 1.0
    with pytest.raises(MaskFileError, match="not those the mask was found on"):
        recall(path, moved)
    other = Head(7, 3, 0, "unit", torch.Generator())
    with pytest.raises(
        MaskFileError, match=r"expected output\.weight of shape \(3, 12\), got \(3, 7\)"
    ):
        recall(path, other)

    learned(settings(), features, tmp_path / "plain.safetensors")
    with pytest.raises(MaskFileError, match="no originals .* exact_recall"):
        recall(tmp_path / "plain.safetensors", head)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MaskFileError, match="no mask file that can be read"):
        recall(tmp_path / "cut.safetensors", head)
    with pytest.raises(MaskFileError):
        recall(tmp_path / "none.safetensors", head)
    for name, value in values(head).items():
        assert value.equal(before[name]), "a refused recall changes nothing"


def test_originals_are_the_free_values_in_order(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    path = tmp_path / "mask.safetensors"
    source, found, _ = learned(settings(exact_recall=True), features, path)
    originals = load_file(path)[f"{MASKED}.originals"]
    assert originals.equal(source.trained[MASKED].flatten()[~found.frozen.to_bool().flatten()])


def test_file_names_are_plain_and_never_shared() -> None:
    assert mask_files.name("art_painting", "naive", 2) == "art_painting-naive-seed2.safetensors"
    odd = {mask_files.name(source, "naive", 0) for source in ("a/b", "a_b", "a:b", "../a", "..")}
    assert len(odd) == 5
    assert all(Path(name).name == name and not name.startswith(".") for name in odd)


def test_naive_has_no_scores(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    config = settings()
    source = stage_1.train(config, "ink", part_of(features["ink"]), 3, 0)
    found = naive.find(config, source, part_of(features["ink"]))
    path = tmp_path / "mask.safetensors"
    mask_files.write(
        path, source, "naive", found, CLASSES, exact_recall=False, train_unmasked=False
    )
    assert f"{MASKED}.scores" not in load_file(path)
