"""Which kernel multiplies by a masked weight, decided by shape, dtype and device alone: no Triton, no device.

    few       up to 4 rows a mask: products on CUDA cores, W read once
    tiles     masked tiles of W go from registers to the tensor cores
    scratch   blocks of W are selected into memory that stays in L2, and torch's product reads them from there

Times are those of a model, bytes over memory's rate or operations over the cores' rate, whichever is longer.
The rates are the makers', but for sm_90 those of an H200's copy and product; only their ratios matter here.
That a product with masked tiles reaches half of the cores' rate and torch's nine tenths is taken from what
was published of mixed-input products on an H100 (40 % with the conversion in the loop, 15 to 20 % more with
the left operand in registers; 94 % converted first), not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows a mask up to which no tensor core is used.
FEW = 4
# Shares of the cores' rate; seconds between launches that wait for each other.
FUSED, DENSE, GAP = 0.5, 0.9, 2.5e-6


@dataclass(frozen=True)
class Device:
    """Bytes a second of memory, operations a second by the kind of product, bytes of L2."""

    memory: float
    half: float
    tf32: float
    single: float
    cache: int


_DEVICES = {
    80: Device(2.0e12, 312e12, 156e12, 19.5e12, 40 << 20),
    86: Device(0.77e12, 155e12, 77e12, 38e12, 6 << 20),
    89: Device(1.0e12, 165e12, 82e12, 82e12, 72 << 20),
    90: Device(4.3e12, 790e12, 390e12, 60e12, 50 << 20),
    100: Device(8.0e12, 2250e12, 1100e12, 75e12, 126 << 20),
}


@dataclass(frozen=True)
class Plan:
    """A path, and for `scratch` the elements of W that a block holds."""

    path: str
    block: int = 0


def device(capability: int) -> Device:
    """The rates of a compute capability such as 90, or of the nearest one below it."""
    return _DEVICES[max((known for known in _DEVICES if known <= capability), default=80)]


def plan(
    B: int, N: int, K: int, samples: int, dtype: torch.dtype, capability: int, tf32: bool = False
) -> Plan:
    """How B rows, in equal groups, are multiplied by a weight (N, K) under each of their masks."""
    if -(-B // samples) <= FEW:
        return Plan("few")
    at, size = device(capability), dtype.itemsize
    cores = at.half if size == 2 else at.tf32 if tf32 else at.single
    weight, moved, operations = N * K, B * (N + K) * size, 2 * B * N * K
    # A third of L2 for the block leaves room for the rows that are read and written beside it.
    block = min(20 << 20, at.cache // 3) // size
    tiled = (weight * (size + samples / 8) + moved) / at.memory
    tiled = max(tiled, operations / (FUSED * cores))
    selected = samples * weight * (size + 1 / 8) / at.memory
    product = max(moved / at.memory, operations / (DENSE * cores))
    launches = 2 * samples * -(-weight // block)
    if selected + product + GAP * launches < tiled:
        return Plan("scratch", block)
    return Plan("tiles")


def dense_first(
    B: int, N: int, K: int, dtype: torch.dtype, capability: int, tf32: bool = False
) -> bool:
    """Whether the gradient of W is sooner torch's product, selected in place, than a product of tiles."""
    at, size = device(capability), dtype.itemsize
    cores = at.half if size == 2 else at.tf32 if tf32 else at.single
    weight, moved, operations = N * K, B * (N + K) * size, 2 * B * N * K
    tiled = max((weight * (size + 1 / 8) + moved) / at.memory, operations / (FUSED * cores))
    product = max((weight * size + moved) / at.memory, operations / (DENSE * cores))
    return product + weight * (2 * size + 1 / 8) / at.memory + GAP < tiled
