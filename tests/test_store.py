"""The cache on disk: where it lies, what it checks, and what it survives."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastmask import _files, _store


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FASTMASK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert _store.folder(None) is None
    assert _store.folder(tmp_path) == tmp_path
    assert _store.folder("auto") == Path("~/.cache/fastmask").expanduser()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _store.folder("auto") == Path("~/Library/Caches/fastmask").expanduser()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _store.folder("auto") == tmp_path / "xdg" / "fastmask"
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "own"))
    assert _store.folder("auto") == tmp_path / "own"


def test_the_digest_sees_names_dtypes_shapes_and_bits() -> None:
    base = torch.zeros(2, 3)
    seen = [
        {"a": base},
        {"b": base},
        {"a": base.view(3, 2)},
        {"a": base.double()},
        {"a": base.int()},
        {"a": -base},
        {"a": base, "b": base},
        {"a": torch.empty(0)},
        {},
    ]
    assert len({_store.tensor_digest(tensors) for tensors in seen}) == len(seen)
    strided = torch.arange(12.0).view(3, 4).T
    assert _store.tensor_digest({"a": strided}) == _store.tensor_digest({"a": strided.contiguous()})
    two = {"a": base, "b": strided}
    assert _store.tensor_digest(two) == _store.tensor_digest(dict(reversed(two.items())))


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "x": torch.tensor([float("nan"), -0.0, 1e-45]),
        "n": torch.arange(3),
        "e": torch.empty(0),
    }
    calls = []

    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return tensors

    for _ in range(2):
        found = _store.fetch(tmp_path / "deep" / "er", "a label/with: signs", {"k": "1"}, build)
        assert _store.tensor_digest(found) == _store.tensor_digest(tensors)
    assert len(calls) == 1
    (kept,) = (tmp_path / "deep" / "er").iterdir()
    assert re.fullmatch(r"a_label_with_signs-[0-9a-f]{24}\.safetensors", kept.name)
    _store.fetch(tmp_path / "deep" / "er", "a label/with: signs", {"k": "2"}, build)
    assert len(calls) == 2


def test_writers_side_by_side_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([i]) * 200_000 for i in range(8)]
    threads = [
        threading.Thread(target=_files.write, args=(path, c)) for c in contents for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
