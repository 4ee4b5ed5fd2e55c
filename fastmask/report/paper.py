"""Table 1 of arXiv 2308.13957 (binary mask), as published: PACS, ResNet-18, one number a cell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PACS = ("art_painting", "cartoon", "photo", "sketch")


@dataclass(frozen=True)
class Published:
    """A cell of the published table: differences to unmasked fine-tuning, shares of 1."""

    source_gain: float
    target_change: float


_ART, _CARTOON, _PHOTO, _SKETCH = PACS
TABLE_1: dict[str, dict[str, Published]] = {
    "source-start": {
        _PHOTO: Published(-0.029, -0.025),
        _ART: Published(0.062, -0.030),
        _CARTOON: Published(0.035, -0.019),
        _SKETCH: Published(0.054, -0.056),
    },
    "source-end": {
        _PHOTO: Published(-0.014, -0.027),
        _ART: Published(0.051, -0.038),
        _CARTOON: Published(0.021, -0.016),
        _SKETCH: Published(0.043, -0.059),
    },
    "random": {
        _PHOTO: Published(-0.014, -0.027),
        _ART: Published(0.064, -0.036),
        _CARTOON: Published(0.001, -0.021),
        _SKETCH: Published(0.023, -0.058),
    },
}


def applies(domains: Collection[str]) -> bool:
    """Whether the published numbers may stand beside a run: its domains are exactly those of PACS."""
    return {name.casefold() for name in domains} == set(PACS)


def published(start: str, source: str | None) -> Published | None:
    """Look up a cell; source None is the mean of the four sources."""
    if start not in TABLE_1:
        return None
    return published_mean(start) if source is None else TABLE_1[start].get(source.casefold())


def published_mean(start: str) -> Published:
    """Average the four sources of a start."""
    cells = list(TABLE_1[start].values())
    return Published(
        sum(cell.source_gain for cell in cells) / len(cells),
        sum(cell.target_change for cell in cells) / len(cells),
    )
