"""Small domains: three classes of numbers seen through four rotations of one space; a few digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask import backbones, data
from fastmask.backbones import Backbone
from fastmask.data import DomainSet, Features
from fastmask.transfer import Config

CLASSES = ("cat", "dog", "owl")
DOMAINS = ("ink", "oil", "film")
WIDTH = 12


def domain(seed: int, rows: int = 45) -> Features:
    """Classes along random directions, different for each seed, with noise and one common feature."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % len(CLASSES)
    centres = torch.randn(len(CLASSES), WIDTH, generator=draws)
    x = torch.relu(centres[y] + 0.4 * torch.randn(rows, WIDTH, generator=draws))
    x[:, 0] = 1.0
    order = torch.randperm(rows, generator=draws)
    return Features(
        x, y, order[: rows * 2 // 3].sort().values, order[rows * 2 // 3 :].sort().values
    )


@pytest.fixture
def features() -> dict[str, Features]:
    return {name: domain(seed) for seed, name in enumerate(DOMAINS)}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """A Config of few steps into a new folder."""

    def make(**given: Any) -> Config:
        few = {
            "source_steps": 30,
            "mask_steps": 12,
            "editor_steps": 12,
            "target_steps": 10,
            "seeds": 1,
            "batch": 16,
            "out": tmp_path / "run",
        }
        return Config(**{**few, **given})

    return make


@pytest.fixture(scope="session")
def domains() -> DomainSet:
    """Eight pictures of each digit, of three domains."""
    whole = data.load("digits")
    rows = torch.arange(800).view(10, 80)[:, :8].reshape(-1)
    names = ("handwritten", "printed", "neon")
    return DomainSet(
        "few digits",
        whole.classes,
        dict.fromkeys(names, torch.arange(10).repeat_interleave(8)),
        {name: tuple(f"{name} {i}" for i in range(80)) for name in names},
        lambda domain, row: whole.image(domain, int(rows[row])),
        dict.fromkeys(names, "few"),
        lambda domain, row: f"{domain}, picture {row}",
    )


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return backbones.load("digits_cnn", "random", cache=None)


@pytest.fixture
def layered(
    settings: Callable[..., Config],
    domains: DomainSet,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Config]]:
    """A Config of few steps over a layer, whose sweep loads `domains` and `backbone`; on one thread."""
    monkeypatch.setattr(data, "load", lambda *_, **__: domains)
    monkeypatch.setattr(backbones, "load", lambda *_, **__: backbone)

    def make(**given: Any) -> Config:
        few = {
            "layers": ("12",),
            "sources": ("handwritten",),
            "targets": ("printed",),
            "starts": ("source-start",),
            "source_steps": 6,
            "mask_steps": 4,
            "editor_steps": 4,
            "target_steps": 4,
        }
        return settings(**{**few, **given})

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(before)
