"""Mask files as the report reads them: which entries are frozen, and the values under them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fastmask.errors import MaskFileError

FORMAT = "1"


@dataclass(frozen=True)
class MaskFile:
    """The head of a mask file: what it was learned on and the shapes of the masked parameters."""

    path: Path
    source: str
    strategy: str
    seed: int
    shapes: dict[str, tuple[int, ...]]
    classes: tuple[str, ...]

    @property
    def last(self) -> str:
        """The last masked parameter: the classifier's weight, which the paper masks."""
        matrices = [name for name, shape in self.shapes.items() if len(shape) > 1]
        return (matrices or list(self.shapes))[-1]

    def frozen(self, name: str) -> NDArray[np.bool_]:
        """Read which entries of a parameter are frozen, in the parameter's shape."""
        shape = self.shapes[name]
        n = math.prod(shape)
        bits = self._tensor(f"{name}.frozen")
        expected = ((n + 63) // 64) * 8
        if bits.dtype != np.uint8 or bits.shape != (expected,):
            raise MaskFileError(
                f"{self.path}: {name}.frozen: expected {expected} bytes of uint8 for shape "
                f"{shape}, got {bits.shape} of {bits.dtype}"
            )
        flat = np.unpackbits(bits, bitorder="little")
        if flat[n:].any():
            raise MaskFileError(f"{self.path}: {name}.frozen: bits are set beyond entry {n}")
        return flat[:n].astype(np.bool_).reshape(shape)

    def weight(self, name: str) -> NDArray[np.float32]:
        """Read the source-trained values of a parameter."""
        values = self._tensor(f"{name}.weight")
        if values.dtype != np.float32 or values.shape != self.shapes[name]:
            raise MaskFileError(
                f"{self.path}: {name}.weight: expected float32 of shape {self.shapes[name]}, "
                f"got {values.dtype} of {values.shape}"
            )
        if not np.isfinite(values).all():
            raise MaskFileError(f"{self.path}: {name}.weight holds values that are not finite")
        return values

    def _tensor(self, key: str) -> NDArray[Any]:
        try:
            with safe_open(self.path, framework="np") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError, TypeError) as error:
            raise MaskFileError(f"{self.path}: {key} cannot be read ({error})") from error


def open_mask(path: Path) -> MaskFile:
    """Read the head of a mask file.

    Raises:
        MaskFileError: it is missing, damaged, of another version, or lacks a field; the message names it.
    """
    try:
        with safe_open(path, framework="np") as file:
            head: dict[str, str] = file.metadata() or {}
            held = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise MaskFileError(f"{path}: no mask file that can be read ({error})") from error
    version = head.get("fastmask_format")
    if version != FORMAT:
        raise MaskFileError(
            f"{path}: fastmask_format: expected {FORMAT!r}, got {version!r}; "
            "it was written by another version of fastmask or by another program"
        )
    try:
        shapes = {
            str(name): tuple(int(size) for size in shape)
            for name, shape in json.loads(head["shapes"]).items()
        }
        classes = tuple(str(name) for name in json.loads(head["classes"]))
        mask = MaskFile(path, head["source"], head["strategy"], int(head["seed"]), shapes, classes)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise MaskFileError(f"{path}: its metadata cannot be used ({error!r})") from error
    _check_shapes(path, shapes, held)
    return mask


def _check_shapes(path: Path, shapes: dict[str, tuple[int, ...]], held: Iterable[str]) -> None:
    if not shapes:
        raise MaskFileError(f"{path}: it names no masked parameter")
    present = set(held)
    for name, shape in shapes.items():
        if any(size < 0 for size in shape):
            raise MaskFileError(f"{path}: shapes: {name} has a negative size {shape}")
        if f"{name}.frozen" not in present:
            raise MaskFileError(f"{path}: {name}.frozen is missing")
