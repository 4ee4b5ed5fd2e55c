"""Small folders of pictures, and a network that costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from picture_files import encoded

from fastmask import backbones

Layout = Mapping[str, Mapping[str, int]]


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[[Layout], Path]:
    """Write `domain/class/n pictures` under a folder of its own."""

    def write(layout: Layout) -> Path:
        seed, folder = 0, tmp_path / "set"
        for domain, classes in layout.items():
            for name, n in classes.items():
                place = folder / domain / name
                place.mkdir(parents=True)
                for i in range(n):
                    (place / f"p{i:02}.png").write_bytes(encoded(seed := seed + 1))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny() -> backbones.Backbone:
    return backbones.load("digits_cnn", weights="random")
