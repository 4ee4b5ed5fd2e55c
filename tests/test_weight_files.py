"""Weight files: strict, told apart when damaged, and never run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastmask import backbones
from fastmask.backbones import weight_files
from fastmask.errors import WeightsError

SMALL = "test_resnet"  # timm's own network for tests


def state_of(name: str, seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(timm.create_model(name).state_dict())


@pytest.fixture(scope="module")
def small_state() -> dict[str, torch.Tensor]:
    return state_of(SMALL)


def test_wrappers_prefixes_and_classifiers_are_taken_off(
    small_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    bare = {name: v for name, v in small_state.items() if not name.startswith("fc.")}
    prefixed = {f"module.{name}": v for name, v in small_state.items()}
    saved = {
        "plain": small_state,
        "without a classifier": bare,
        "other classes": {**bare, "fc.weight": torch.zeros(7, 3), "fc.bias": torch.zeros(7)},
        "state_dict": {"state_dict": prefixed, "epoch": 3},
        "model": {"model": small_state, "optimizer": {"lr": 0.1}},
        "no counters": {n: v for n, v in small_state.items() if "num_batches" not in n},
    }
    prints = set()
    for name, content in saved.items():
        torch.save(content, tmp_path / f"{name}.pth")
        prints.add(backbones.load(SMALL, tmp_path / f"{name}.pth").fingerprint)
    save_file(small_state, tmp_path / "plain.safetensors")
    prints.add(backbones.load(SMALL, str(tmp_path / "plain.safetensors")).fingerprint)
    assert len(prints) == 1


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))]
)
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, writer: Callable[..., object]) -> None:
    mark = tmp_path / "ran"
    writer({"weight": Malicious(str(mark))}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad.pth: a pickle that holds more than tensors"):
        backbones.load(SMALL, tmp_path / "bad.pth")
    assert not mark.exists()


FAULTS: dict[str, tuple[str, Callable[[bytes, bytes], bytes], str]] = {
    "empty": (".pth", lambda pth, st: b"", "the weight file is empty"),
    "empty safetensors": (".safetensors", lambda pth, st: b"", "the weight file is empty"),
    "lfs": (
        ".safetensors",
        lambda pth, st: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git-LFS pointer",
    ),
    "truncated": (".pth", lambda pth, st: pth[: len(pth) // 2], "truncated PyTorch file"),
    "truncated safetensors": (".safetensors", lambda pth, st: st[:-50], "truncated or damaged"),
    "header alone": (".safetensors", lambda pth, st: st[:6], "truncated or damaged"),
    "header bomb": (".safetensors", lambda pth, st: b"\xff" * 8 + st[8:], "truncated or damaged"),
    "zip as safetensors": (".safetensors", lambda pth, st: pth, "this is a pickle as torch.save"),
    "safetensors as zip": (".pth", lambda pth, st: st, "this is safetensors"),
    "text": (".pth", lambda pth, st: b"<html>404</html>", "not a PyTorch weight file"),
    "unknown ending": (
        ".onnx",
        lambda pth, st: pth,
        "expected a weight file ending in .safetensors",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_files_are_told_apart(
    small_state: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    torch.save(small_state, tmp_path / "good.pth")
    save_file(small_state, tmp_path / "good.safetensors")
    ending, spoil, said = FAULTS[name]
    path = tmp_path / f"bad{ending}"
    path.write_bytes(
        spoil((tmp_path / "good.pth").read_bytes(), (tmp_path / "good.safetensors").read_bytes())
    )
    with pytest.raises(WeightsError, match=said) as caught:
        backbones.load(SMALL, path)
    assert str(path) in str(caught.value)


def test_a_truncated_old_pickle_and_a_damaged_zip_are_told(
    small_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    old = tmp_path / "old.pth"
    torch.save(small_state, old, _use_new_zipfile_serialization=False)
    whole = old.read_bytes()
    backbones.load(SMALL, old)
    for share in (0.001, 0.02, 0.5, 0.99):
        old.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(WeightsError, match="old.pth: truncated"):
            backbones.load(SMALL, old)


def test_other_networks_are_told_by_their_first_tensors(
    small_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(state_of("test_vit"), path)
    with pytest.raises(WeightsError) as caught:
        backbones.load(SMALL, path)
    said = str(caught.value)
    assert "weights of another network" in said and "tensors are missing: conv1" in said
    assert "are not expected: " in said and " more" in said
    name = next(n for n, v in small_state.items() if v.dim() == 4)
    save_file({**small_state, name: torch.zeros(1, 2, 3, 3)}, path)
    shape = tuple(small_state[name].shape)
    with pytest.raises(WeightsError) as caught:
        backbones.load(SMALL, path)
    assert f"1 have another shape: {name} is (1, 2, 3, 3), expected {shape}" in str(caught.value)
    save_file({**small_state, "extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="1 are not expected: extra$"):
        backbones.load(SMALL, path)


@pytest.mark.parametrize(
    "content, said",
    [
        ([1, 2], "got list"),
        ({}, "got an empty one"),
        ({"a": torch.zeros(1), "b": 3}, "no tensors: b"),
        ({"a": torch.tensor([1.0, float("nan")])}, "NaN or infinite values in a"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=said):
        backbones.load(SMALL, tmp_path / "odd.pth")


def test_nothing_is_half_loaded(small_state: dict[str, torch.Tensor]) -> None:
    network = timm.create_model(SMALL, num_classes=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    name = next(reversed([n for n in before if n.endswith("weight")]))
    with pytest.raises(WeightsError):
        weight_files.fit(
            {**small_state, name: torch.zeros(1)}, network, ("fc",), Path("other.safetensors")
        )
    after = network.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items())
