"""The bit layout: element e of a tensor is bit e % 8 of byte e // 8, in logical order, padded with 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

WORD_BITS = 64
WORD_BYTES = 8


def packed_bytes(numel: int) -> int:
    """Bytes of one packed mask over `numel` elements: `ceil(numel / 64) * 8`."""
    return -(-numel // WORD_BITS) * WORD_BYTES


def numel_of(shape: Sequence[int]) -> int:
    """Number of elements of a tensor of this shape."""
    return math.prod(shape)
