"""The embedded digits: made alike every time, no original on two sides, and a gap that is real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmask import backbones, data
from fastmask.backbones import digits_cnn, drawing
from fastmask.data import DomainSet, Features, digits
from fastmask.errors import DataError

Heads = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def domains() -> DomainSet:
    return data.load("digits")


@pytest.fixture(scope="module")
def features(domains: DomainSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Features]:
    backbone = backbones.load("digits_cnn", cache=tmp_path_factory.mktemp("weights"))
    return data.extract(domains, backbone, cache=None)


def test_four_domains_of_eighty_pictures_a_digit(domains: DomainSet) -> None:
    assert domains.domains == ("handwritten", "chalk", "printed", "neon")
    assert domains.classes == tuple("0123456789")
    assert domains.counts() == {d: dict.fromkeys("0123456789", 80) for d in domains.domains}
    for domain in domains.domains:
        picture = domains.image(domain, 799)
        assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    sheet = domains.examples("neon", per_class=2)
    assert [len(arrays) for arrays in sheet.values()] == [2] * 10


def test_every_drawing_is_made_alike_and_none_twice(domains: DomainSet) -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    again = digits.load.__wrapped__()
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.fingerprint == domains.fingerprint and again is not domains
    pictures = {
        domains.image(d, row).numpy().tobytes() for d in domains.domains for row in range(800)
    }
    assert len(pictures) == 3200
    assert data.load("digits") is domains


def groups_of(domains: DomainSet, side: str, seed: int, holdout: float = 0.0) -> set[str]:
    """The groups that lie on one side of the split of any domain."""
    return {
        domains.item(domain, row).split("(")[1]
        for domain in domains.domains
        for row in getattr(domains.split(domain, seed, holdout), side).tolist()
    }


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_no_original_stands_on_both_sides_in_any_domain(fraction: float) -> None:
    domains = data.load("digits", test_fraction=fraction)
    for seed in range(4):
        train = groups_of(domains, "train", seed, 0.2)
        test = groups_of(domains, "test", seed, 0.2)
        val = groups_of(domains, "val", seed, 0.2)
        assert not train & test and not train & val and not val & test
        # 1,600 originals and a hundred digits of typefaces, none of them lost.
        assert len(train | test | val) == 1700
        for domain in domains.domains:
            tested = domains.labels(domain)[domains.split(domain, seed).test]
            assert torch.bincount(tested).tolist() == [round(80 * fraction)] * 10


def test_each_original_is_drawn_once() -> None:
    rows, images = digits._originals()
    assert rows.shape == (10, 160) and len(set(rows.reshape(-1).tolist())) == 1600
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1


def test_the_backbone_learns_from_letters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    plain = drawing.glyph

    def glyph(file: str, character: str) -> np.ndarray:
        asked.add(character)
        return plain(file, character)

    monkeypatch.setattr(drawing, "glyph", glyph)
    monkeypatch.setattr("sklearn.datasets.load_digits", None)
    pictures, labels = digits_cnn.draw_letters(0, 2)
    assert asked == set(digits_cnn.LETTERS) and all(character.isalpha() for character in asked)
    assert pictures.shape == (104, 3, 32, 32) and pictures.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [2] * 52


def test_fonts_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="fonts that matplotlib ships; .*cmr10.ttf is missing"):
        drawing.glyph.__wrapped__("cmr10.ttf", "3")


def trained(
    features: Features, start: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear head after 600 steps of Adam on the training part."""
    generator = torch.Generator().manual_seed(1)
    width = features.x.shape[1] ** -0.5
    weight = torch.empty(10, features.x.shape[1]).uniform_(-width, width, generator=generator)
    head = start or (weight, torch.zeros(10))
    weight, bias = (value.clone().requires_grad_() for value in head)
    optimizer = torch.optim.Adam([weight, bias], lr=3e-3)
    x, y = features.x[features.train], features.y[features.train]
    for _ in range(600):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(x[rows] @ weight.T + bias, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def accuracy(head: tuple[torch.Tensor, torch.Tensor], features: Features) -> float:
    guessed = (features.x[features.test] @ head[0].T + head[1]).argmax(1)
    return (guessed == features.y[features.test]).double().mean().item()


@pytest.fixture(scope="module")
def heads(features: dict[str, Features]) -> Heads:
    return {domain: trained(found) for domain, found in features.items()}


def pairs(features: dict[str, Features]) -> list[tuple[str, str]]:
    return [(s, t) for s in features for t in features if s != t]


def test_features_are_good_but_leave_room(features: dict[str, Features], heads: Heads) -> None:
    for domain, found in features.items():
        assert found.x.shape == (800, 256) and found.x.isfinite().all()
        assert 0.80 <= accuracy(heads[domain], found) <= 0.995, domain


def test_the_gap_between_domains_is_real(features: dict[str, Features], heads: Heads) -> None:
    lost = {
        (s, t): accuracy(heads[s], features[s]) - accuracy(heads[s], features[t])
        for s, t in pairs(features)
    }
    assert sum(loss >= 0.15 for loss in lost.values()) >= 8, lost


def test_fine_tuning_on_a_target_forgets_the_source(
    features: dict[str, Features], heads: Heads
) -> None:
    forgotten = {
        (s, t): accuracy(heads[s], features[s])
        - accuracy(trained(features[t], heads[s]), features[s])
        for s, t in pairs(features)
    }
    assert sum(loss >= 0.03 for loss in forgotten.values()) > 6, forgotten
