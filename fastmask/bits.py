"""BitMask: packed bits and the logical shape they are of, with the algebra of sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask import ops
from fastmask.ops._layout import numel_of, packed_bytes


class BitMask:
    """One bit for each element of a tensor: bit `e % 8` of byte `e // 8` is element e in logical order.

    `~a`, `a & b`, `a | b`, `a ^ b`, `a - b` (in a and not in b) and `a == b` work on whole masks of one
    shape. What a 1 means is said by the argument a mask is given to: `active` or `frozen`.

    Args:
        bits: uint8 (ceil(n / 64) * 8,), padding bits 0, as `fastmask.ops.pack` returns.
        shape: logical shape of the masked tensor, n elements.

    Raises:
        TypeError, ValueError: dtype, number of bytes, or padding bits are wrong.
    """

    __slots__ = ("bits", "shape")

    def __init__(self, bits: Tensor, shape: Sequence[int]) -> None:
        size = torch.Size(shape)
        numel = numel_of(size)
        if not isinstance(bits, Tensor):
            raise TypeError(f"bits: expected a torch.Tensor, got {type(bits).__name__}")
        if bits.dtype != torch.uint8:
            raise TypeError(f"bits: expected dtype torch.uint8, got {bits.dtype}")
        if tuple(bits.shape) != (packed_bytes(numel),):
            raise ValueError(
                f"bits: expected ({packed_bytes(numel)},) bytes for shape {tuple(size)}, "
                f"got {tuple(bits.shape)}"
            )
        if bits.device.type != "meta" and bool((bits & ~_valid(numel, bits.device)).any()):
            raise ValueError(
                f"bits: expected padding bits after element {numel - 1} to be 0, found ones"
            )
        self.bits = bits
        self.shape = size

    @classmethod
    def from_bool(cls, mask: Tensor | np.ndarray | Sequence[Any]) -> BitMask:
        """Pack a mask of bools, or of numbers that are all 0 or 1.

        Raises:
            ValueError: a number is neither 0 nor 1 (NaN included).
        """
        tensor = torch.as_tensor(mask)
        if tensor.dtype != torch.bool:
            ones = tensor == 1
            strange = ~(ones | (tensor == 0))
            if bool(strange.any()):
                first = tensor[strange].reshape(-1)[0].item()
                raise ValueError(f"mask: expected bools or numbers 0 and 1, got {first}")
            tensor = ones
        return cls(ops.pack(tensor), tensor.shape)

    @classmethod
    def ones(cls, shape: Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """All ones."""
        return cls(_valid(numel_of(shape), device), shape)

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """All zeros."""
        size = packed_bytes(numel_of(shape))
        return cls(torch.zeros(size, dtype=torch.uint8, device=device), shape)

    def to_bool(self) -> Tensor:
        """Unpack to a bool tensor of the mask's shape."""
        return ops.unpack(self.bits, self.shape)

    def numel(self) -> int:
        """Number of elements n."""
        return numel_of(self.shape)

    def count(self) -> int:
        """Number of ones."""
        return int(ops.popcount(self.bits))

    @property
    def density(self) -> float:
        """Share of ones, `count / n`; 0 for a mask of no elements."""
        return self.count() / max(self.numel(), 1)

    @property
    def device(self) -> torch.device:
        """Device of the bits."""
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes the bits take."""
        return self.bits.numel()

    def to(self, device: torch.device | str) -> BitMask:
        """The same mask on another device."""
        return BitMask(self.bits.to(device), self.shape)

    def clone(self) -> BitMask:
        """A copy with bits of its own."""
        return BitMask(self.bits.clone(), self.shape)

    def hamming(self, other: BitMask) -> int:
        """Number of elements in which two masks differ: `popcount(a ^ b)`."""
        return (self ^ other).count()

    def iou(self, other: BitMask) -> float:
        """Intersection over union of the ones: `popcount(a & b) / popcount(a | b)`; 1 for two empty masks."""
        union = (self | other).count()
        return (self & other).count() / union if union else 1.0

    def __and__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_xor)

    def __sub__(self, other: BitMask) -> BitMask:
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> BitMask:
        return BitMask(self.bits ^ _valid(self.numel(), self.device), self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.bits, other.bits.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.device.type == "meta":
            return f"BitMask(shape={tuple(self.shape)}, device=meta)"
        return (
            f"BitMask(shape={tuple(self.shape)}, density={self.density:.4f}, "
            f"{self.nbytes} bytes, device={self.device})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return BitMask, (self.bits, tuple(self.shape))

    def _combine(self, other: BitMask, operation: Callable[[Tensor, Tensor], Tensor]) -> BitMask:
        if not isinstance(other, BitMask):
            raise TypeError(f"other: expected a BitMask, got {type(other).__name__}")
        if other.shape != self.shape:
            raise ValueError(
                f"other: expected a mask of shape {tuple(self.shape)}, got {tuple(other.shape)}"
            )
        if other.device != self.device:
            raise ValueError(f"other: expected a mask on {self.device}, got one on {other.device}")
        return BitMask(operation(self.bits, other.bits), self.shape)


def _valid(numel: int, device: torch.device | str | None) -> Tensor:
    """Bits with ones at the elements and zeros in the padding."""
    bits = torch.full((packed_bytes(numel),), 255, dtype=torch.uint8, device=device)
    whole, rest = divmod(numel, 8)
    bits[whole:] = 0
    if rest:
        bits[whole] = (1 << rest) - 1
    return bits
