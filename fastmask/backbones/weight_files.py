"""Weight files of backbones: read without running anything in them, matched strictly to a network."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.errors import WeightsError

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_NAMED = 3


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a PyTorch file through `weights_only=True` alone.

    Wrappers `{"state_dict": ...}` and `{"model": ...}` and a prefix `module.` are taken off.

    Raises:
        WeightsError: the file is missing, empty, a git-LFS pointer, truncated, a pickle of more than
            tensors, or of an unknown kind.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weight file")
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise WeightsError(f"{path}: the weight file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: this is a git-LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _unwrap(_read_safetensors(path, start), path)
    if suffix in PICKLED:
        return _unwrap(_read_pickled(path, start), path)
    raise WeightsError(
        f"{path}: expected a weight file ending in .safetensors or {', '.join(PICKLED)}, got {suffix!r}"
    )


def _read_safetensors(path: Path, start: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # Protocol 2 and later start with 0x80; a zip is what torch.save writes.
    if start.startswith((b"\x80", b"PK\x03\x04")):
        raise WeightsError(
            f"{path}: this is a pickle as torch.save writes it, not safetensors; give it the ending .pth "
            f"and it is read through weights_only=True"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: truncated or damaged safetensors ({error})") from error


def _read_pickled(path: Path, start: bytes) -> Any:
    zipped = start.startswith(b"PK")
    if zipped and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path}: truncated PyTorch file (its end is missing)")
    if not zipped and start[8:9] == b"{":
        raise WeightsError(f"{path}: this is safetensors; give it the ending .safetensors")
    if not zipped and not start.startswith(b"\x80"):
        raise WeightsError(f"{path}: this is not a PyTorch weight file")
    try:
        # No fallback: without weights_only, loading a file would run whatever it asks for.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "Ran out of input" in str(error):
            raise WeightsError(f"{path}: truncated PyTorch file ({error})") from error
        raise WeightsError(
            f"{path}: a pickle that holds more than tensors; loading it could run code, so it is refused. "
            f"Save the state dict alone, best as safetensors"
        ) from error
    # The restricted unpickler walks into whatever bytes it is given: struct.error, IndexError and others.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: truncated or damaged PyTorch file ({first})") from error


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise WeightsError(f"{path}: expected a state dict of tensors, got {_kind(found)}")
    strangers = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WeightsError(
            f"{path}: expected tensors alone in the state dict; no tensors: {_few(strangers)}"
        )
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    broken = [n for n, v in found.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if broken:
        raise WeightsError(f"{path}: NaN or infinite values in {_few(broken)}")
    return dict(found)


def fit(state: Mapping[str, Tensor], network: nn.Module, heads: Iterable[str], path: Path) -> None:
    """Load a state dict into a network that has no classifier, every other tensor being required.

    Args:
        state: name -> tensor; names that start with one of `heads` and a dot are the classifier: dropped.
        network: changed only when everything fits.
        heads: prefixes of the classifier's tensors.
        path: named in messages.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; the first few are named.
    """
    prefixes = tuple(f"{head}." for head in heads)
    body = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    wanted = {name: v for name, v in network.state_dict().items() if not name.startswith(prefixes)}
    # Files written before PyTorch 0.4.1 have no such counter, and nothing reads it in eval mode.
    missing = [n for n in wanted if n not in body and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in body if name not in wanted]
    reshaped = [
        f"{name} is {tuple(body[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in body and body[name].shape != value.shape
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} tensors are missing: {_few(missing)}")
    if unexpected:
        faults.append(f"{len(unexpected)} are not expected: {_few(unexpected)}")
    if reshaped:
        faults.append(f"{len(reshaped)} have another shape: {_few(reshaped)}")
    if faults:
        raise WeightsError(f"{path}: the weights of another network; " + "; ".join(faults))
    network.load_state_dict(body, strict=False)


def by_order(state: Mapping[str, Tensor], network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Give a state dict the names of a network that has the same tensors in the same order.

    Raises:
        WeightsError: the number of tensors differs, or the shape of one.
    """
    own = network.state_dict()
    if len(own) != len(state):
        raise WeightsError(
            f"{path}: the weights of another network; expected {len(own)} tensors, got {len(state)}"
        )
    renamed = {}
    for (name, place), (theirs, value) in zip(own.items(), state.items(), strict=True):
        if place.shape != value.shape:
            raise WeightsError(
                f"{path}: the weights of another network; {theirs} is {tuple(value.shape)}, "
                f"expected {tuple(place.shape)} as {name}"
            )
        renamed[name] = value
    return renamed


def _few(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _kind(found: Any) -> str:
    return "an empty one" if isinstance(found, Mapping) else type(found).__name__
