"""Small domains made of numbers: three classes seen through four rotations of one space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask.data import Features
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
