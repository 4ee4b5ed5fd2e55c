"""Tensors kept on disk between runs: written whole or not at all, checked when read, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastmask import _files

FORMAT = "1"


class CacheWarning(UserWarning):
    """A cached file was damaged and is made again, or the cache folder cannot be used."""


def folder(cache: str | Path | None) -> Path | None:
    """The folder a `cache` argument means: "auto" is the user's own cache folder, None is no cache."""
    if cache is None:
        return None
    if cache != "auto":
        return Path(cache).expanduser()
    if named := os.environ.get("FASTMASK_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastmask"


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fetch(
    cache: str | Path | None,
    label: str,
    key: Mapping[str, str],
    build: Callable[[], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Read the tensors kept under `key`, or build and keep them.

    Args:
        cache: a folder, "auto" or None (see `folder`).
        label: what a person may read in the file's name.
        key: all that the tensors depend on; stored in the file and compared when it is read.
        build: makes the tensors; called when there is no good file.

    Warns:
        CacheWarning: the file is damaged, or the folder cannot be written to.
    """
    place = folder(cache)
    if place is None:
        return build()
    wanted = json.dumps({**key, "format": FORMAT}, sort_keys=True)
    plain = re.sub(r"[^\w.-]+", "_", label)[:80]
    path = place / f"{plain}-{hashlib.sha256(wanted.encode()).hexdigest()[:24]}.safetensors"
    if path.exists():
        try:
            return _read(path, wanted)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(
                f"the cached file {path} is damaged ({error}); it is made again",
                CacheWarning,
                stacklevel=3,
            )
    tensors = build()
    try:
        place.mkdir(parents=True, exist_ok=True)
        _files.write(path, save(tensors, {"key": wanted, "sha256": tensor_digest(tensors)}))
    except OSError as error:
        warnings.warn(
            f"nothing is cached: {place} cannot be written to ({error})", CacheWarning, stacklevel=3
        )
    return tensors


def _read(path: Path, wanted: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
        if said.get("key") != wanted:
            raise ValueError("it was written under another key")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensor_digest(tensors) != said.get("sha256"):
        raise ValueError("its checksum does not match its content")
    return tensors
