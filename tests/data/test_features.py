"""Features: computed once, equal to what the network gives, and never taken from a damaged file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picture_files import encoded
from safetensors.torch import load_file, save_file
from torch import nn

from fastmask import backbones, data
from fastmask._store import CacheWarning
from fastmask.backbones import Backbone
from fastmask.data import DomainSet
from fastmask.errors import DataError, WeightsError

LAYOUT = {"art": {"dog": 4, "cat": 3}, "photo": {"dog": 2, "cat": 5}}
Write = Callable[[dict[str, dict[str, int]]], Path]


@pytest.fixture
def domains(pictures: Write) -> DomainSet:
    return data.load(pictures(LAYOUT))


class Counting(nn.Module):
    """Stands for a network that must not run again, or counts how often it does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.pictures = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pictures += len(x)
        return self.inner(x)


class Spoilt(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def counting(tiny: Backbone) -> tuple[Backbone, Counting]:
    module = Counting(tiny.module)
    return replace(tiny, module=module), module


def test_features_are_those_of_the_network(domains: DomainSet, tiny: Backbone) -> None:
    found = data.extract(domains, tiny, cache=None, split_seed=5)
    assert list(found) == ["art", "photo"]
    for domain, features in found.items():
        batch = tiny.transform.batch([domains.image(domain, row) for row in range(7)])
        with torch.no_grad():
            expected = tiny.module(batch)
        # The network sees the same seven pictures in one batch, so no rounding can differ.
        assert torch.equal(features.x, expected)
        assert features.x.dtype == torch.float32 and not features.x.requires_grad
        assert not features.x.is_inference()
        assert torch.equal(features.y, domains.labels(domain))
        split = domains.split(domain, 5)
        assert torch.equal(features.train, split.train) and torch.equal(features.test, split.test)


def test_what_lies_in_the_cache_is_not_computed_again(
    domains: DomainSet, tiny: Backbone, tmp_path: Path
) -> None:
    backbone, network = counting(tiny)
    first = data.extract(domains, backbone, tmp_path / "cache")
    assert network.pictures == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Neither the split nor what is held out is part of the key.
        second = data.extract(domains, backbone, tmp_path / "cache", split_seed=1, holdout=0.5)
    assert network.pictures == 14
    assert all(torch.equal(first[d].x, second[d].x) for d in first)
    assert len(second["art"].val) > 0
    assert not torch.equal(first["art"].test, second["art"].test)
    assert sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "cache").iterdir()) == [
        "digits_cnn-art",
        "digits_cnn-photo",
    ]


def test_other_weights_transform_or_pictures_are_computed_anew(
    domains: DomainSet, tiny: Backbone, tmp_path: Path
) -> None:
    backbone, network = counting(tiny)
    data.extract(domains, backbone, tmp_path)
    data.extract(domains, replace(backbone, fingerprint="other"), tmp_path)
    assert network.pictures == 28
    shifted = replace(tiny.transform, mean=(0.0, 0.0, 0.0))
    data.extract(domains, replace(backbone, transform=shifted), tmp_path)
    assert network.pictures == 42


def test_a_changed_picture_is_noticed(pictures: Write, tiny: Backbone, tmp_path: Path) -> None:
    folder = pictures(LAYOUT)
    backbone, network = counting(tiny)
    data.extract(data.load(folder), backbone, tmp_path / "cache")
    (folder / "art" / "dog" / "p00.png").write_bytes(encoded(500))
    data.extract(data.load(folder), backbone, tmp_path / "cache")
    assert network.pictures == 14 + 7


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """A good file of other features under this one's name."""
    other = next(p for p in path.parent.glob("*.safetensors") if p != path)
    path.write_bytes(other.read_bytes())


def strip(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, flip, empty, swap, strip])
def test_a_damaged_cache_is_noticed_said_and_rebuilt(
    domains: DomainSet, tiny: Backbone, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good = data.extract(domains, tiny, tmp_path)
    path = next(p for p in tmp_path.iterdir() if "-art-" in p.name)
    damage(path)
    backbone, network = counting(tiny)
    with pytest.warns(CacheWarning, match="digits_cnn-art-.* is damaged .* made again"):
        again = data.extract(domains, backbone, tmp_path)
    assert network.pictures == 7
    assert all(torch.equal(good[d].x, again[d].x) for d in good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.extract(domains, backbone, tmp_path)
    assert network.pictures == 7


def test_a_cache_that_cannot_be_written_costs_time_alone(
    domains: DomainSet, tiny: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CacheWarning, match="nothing is cached"):
        found = data.extract(domains, tiny, tmp_path / "file" / "cache")
    assert torch.equal(found["art"].x, data.extract(domains, tiny, None)["art"].x)


def test_no_cache_writes_nothing(
    domains: DomainSet, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "own"))
    data.extract(domains, tiny, None)
    assert not (tmp_path / "own").exists()
    data.extract(domains, tiny)
    assert len(list((tmp_path / "own").iterdir())) == 2


def test_an_interrupted_write_leaves_no_trace(
    domains: DomainSet, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.extract(domains, tiny, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_picture_that_does_not_decode_is_named_and_its_domain_not_kept(
    pictures: Write, tiny: Backbone, tmp_path: Path
) -> None:
    folder = pictures({"art": {"dog": 2, "cat": 2}, **LAYOUT, "sketch": {"dog": 2, "cat": 2}})
    broken = ["photo/cat/p01.png", "photo/dog/p00.png", "sketch/dog/p01.png"]
    for seed, name in enumerate(broken):
        whole = encoded(seed, side=40)
        (folder / name).write_bytes(whole[: len(whole) // 2])
    domains = data.load(folder)
    backbone, network = counting(tiny)
    with pytest.raises(DataError) as caught:
        data.extract(domains, backbone, tmp_path / "cache", batch_size=3)
    assert "3 faults" in str(caught.value)
    assert all(f"{name}: cannot be decoded" in str(caught.value) for name in broken)
    assert [p.name[:15] for p in (tmp_path / "cache").iterdir()] == ["digits_cnn-art-"]
    for seed, name in enumerate(broken):
        (folder / name).write_bytes(encoded(seed, side=40))
    done = network.pictures
    data.extract(data.load(folder), backbone, tmp_path / "cache")
    assert network.pictures == done + 7 + 4


def test_a_file_that_went_away_is_named(pictures: Write, tiny: Backbone) -> None:
    folder = pictures(LAYOUT)
    domains = data.load(folder)
    (folder / "art" / "cat" / "p02.png").unlink()
    with pytest.raises(DataError, match=r"art/cat/p02.png: cannot be read"):
        data.extract(domains, tiny, None)


def test_features_that_are_not_finite_are_refused(domains: DomainSet, tiny: Backbone) -> None:
    broken = replace(tiny, module=nn.Sequential(Spoilt(), tiny.module))
    with pytest.raises(WeightsError, match="not finite for 7 of 7 pictures, first art/cat/p00.png"):
        data.extract(domains, broken, None)


def test_progress_goes_from_nothing_to_all(domains: DomainSet, tiny: Backbone) -> None:
    seen: list[tuple[str, int, int]] = []
    data.extract(domains, tiny, None, batch_size=3, progress=lambda *said: seen.append(said))
    for domain in domains.domains:
        done = [(d, n) for label, d, n in seen if label == f"features of {domain}"]
        assert done == [(0, 7), (3, 7), (6, 7), (7, 7)]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        data.extract(domains, tiny, None, batch_size=0)


def test_a_backbone_on_no_known_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device: expected one that works here"):
        backbones.load("digits_cnn", weights="random", device="cuda:77")
