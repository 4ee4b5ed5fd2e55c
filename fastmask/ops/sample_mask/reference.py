"""Specification of sample_mask: Philox4x32-10 words against an integer threshold of the logit.

    key = seed (64 bits)      counter = (e // 4 low, e // 4 high, sample, stream)
    element e takes word e % 4; k = word >> 8; the bit is 1 where k < T(l) = floor(sigmoid(l) * 2^24)

Every step is an integer operation or one rounded IEEE float32 operation, so any back end that keeps
multiplications and additions apart gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.pack.reference import pack

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

_LOG2E = 1.44269502162933349609375
# ln 2 in two parts: the first has 9 significant bits, so n * _LN2_HIGH is exact for every n that occurs.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194442e-4
# Minimax polynomial of exp(-r) on |r| <= ln(2) / 2; relative error 1.4e-7 before rounding.
_EXP = (1.0, -0.999999821, 0.499990255, -0.166671857, 0.0419019051, -0.00831876509)
# exp(-40) < 2^-57: beyond it the threshold is 0 or 2^24 in float32.
_SATURATED = 40.0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 of broadcastable int64 tensors holding 32-bit words; words on a new last axis."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, yet their 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def uniform24(numel: int, seed: Tensor, samples: int, stream: int) -> Tensor:
    """The 24-bit integers k of every element and sample, int64 (samples, numel)."""
    block = torch.arange(-(-numel // 4), dtype=torch.int64, device=seed.device)
    sample = torch.arange(samples, dtype=torch.int64, device=seed.device).unsqueeze(1)
    third = torch.full_like(sample, stream)
    words = philox((block & _LOW, block >> 32, sample, third), (seed & _LOW, (seed >> 32) & _LOW))
    return words.view(samples, -1)[:, :numel] >> 8


def sigmoid(logits: Tensor) -> Tensor:
    """The contract's float32 sigmoid; NaN gives 0."""
    logits = torch.where(logits.isnan(), -_SATURATED, logits.float())
    a = logits.abs().clamp(max=_SATURATED)
    n = torch.floor(a * _LOG2E + 0.5)
    r = (a - n * _LN2_HIGH) - n * _LN2_LOW
    z = torch.full_like(r, _EXP[5])
    for coefficient in reversed(_EXP[:5]):
        z = z * r + coefficient
    # 2^-n, exactly, by its bits.
    z = z * ((127 - n.int()) << 23).view(torch.float32)
    return torch.where(logits >= 0, torch.ones_like(z), z) / (1.0 + z)


def threshold(logits: Tensor) -> Tensor:
    """T(l) = floor(sigmoid(l) * 2^24), int64."""
    return torch.floor(sigmoid(logits) * 16777216.0).long()


def noise(numel: int, seed: Tensor, samples: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Logistic(0, 1) noise of every element and sample: log(2^25 - 1 - 2k) - log(2k + 1)."""
    k = uniform24(numel, seed, samples, stream)
    return torch.log((2**25 - 1 - 2 * k).to(dtype)) - torch.log((2 * k + 1).to(dtype))


def sample(logits: Tensor, seed: Tensor, samples: int, stream: int) -> Tensor:
    """Sampled masks as bools (samples, numel)."""
    flat = logits.reshape(-1)
    return uniform24(flat.numel(), seed, samples, stream) < threshold(flat)


def sample_mask(logits: Tensor, seed: Tensor, samples: int, stream: int) -> Tensor:
    """Sampled masks as packed bits (samples, bytes)."""
    masks = sample(logits, seed, samples, stream)
    return torch.stack([pack(mask, 0.0) for mask in masks.unbind()])
