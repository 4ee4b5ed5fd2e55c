"""Random bits: the same however the work is split, and independent where they should be.

A right generator fails a limit here with a probability under 1e-9 a comparison. Examples are derived from the
test (`derandomize` in tests/conftest.py), so a test that passes once passes until the code changes.
"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmask import ops
from fastmask.ops.sample_mask import reference
from fastmask.testing import values

KEYS = st.integers(0, 2**64 - 1)
STREAMS = st.integers(0, 2**32 - 1)
N = 1 << 14
# -ln of the probability with which a right generator fails one comparison.
RARE = 9 * math.log(10)


def bits(logits: Tensor, seed: int, samples: int = 1, stream: int = 0) -> Tensor:
    return ops.unpack(ops.sample_mask(logits, seed, samples, stream), logits.shape)


@given(KEYS, STREAMS, st.integers(1, 5), st.integers(0, 300), st.integers(0, 300))
def test_an_elements_bit_knows_its_index_and_sample_alone(
    seed: int, stream: int, samples: int, numel: int, more: int
) -> None:
    logits = values(numel + more, seed=1)
    whole = bits(logits, seed, samples, stream)
    # Fewer elements, fewer samples, another shape: the bits are the same.
    assert torch.equal(bits(logits[:numel], seed, samples, stream), whole[:, :numel])
    for fewer in range(1, samples):
        assert torch.equal(bits(logits, seed, fewer, stream), whole[:fewer])
    folded = logits.view(1, -1, 1)
    assert torch.equal(bits(folded, seed, samples, stream).view_as(whole), whole)
    # What other elements' logits are does not matter.
    others = torch.where(torch.arange(numel + more) < numel, logits, 7.0)
    assert torch.equal(bits(others, seed, samples, stream)[:, :numel], whole[:, :numel])


@given(KEYS, STREAMS, st.integers(1, 200), st.integers(1, 3))
def test_a_higher_logit_never_loses_its_bit(
    seed: int, stream: int, numel: int, samples: int
) -> None:
    low = 3 * values(numel, seed=2)
    high = low + values(numel, seed=3).abs()
    assert not (bits(low, seed, samples, stream) & ~bits(high, seed, samples, stream)).any()


@given(KEYS, STREAMS, st.floats(-8, 8, width=32))
@settings(max_examples=20)
def test_the_share_of_ones_is_the_sigmoid(seed: int, stream: int, logit: float) -> None:
    """Bernstein: P(|mean - p| > t) <= 2 exp(-N t^2 / (2 p q + 2 t / 3))."""
    mean = bits(torch.full((N,), logit), seed, stream=stream).double().mean().item()
    p = 1 / (1 + math.exp(-logit))
    rare = RARE + math.log(2)
    # The positive root of N t^2 - (2 rare / 3) t - 2 p q rare = 0.
    t = (rare / 3 + math.sqrt(rare**2 / 9 + 2 * N * p * (1 - p) * rare)) / N
    # T(l) is within two counts of 2^24 of the exact sigmoid.
    assert abs(mean - p) <= t + 2**-23


def chi_square(cells: Tensor, kinds: int) -> float:
    """Of counts against equal shares; `kinds - 1` degrees of freedom."""
    counts = torch.bincount(cells, minlength=kinds).double()
    expected = len(cells) / kinds
    return ((counts - expected) ** 2 / expected).sum().item()


def limit(freedom: int) -> float:
    """Laurent and Massart: P(chi2 >= d + 2 sqrt(d t) + 2 t) <= exp(-t)."""
    return freedom + 2 * math.sqrt(freedom * RARE) + 2 * RARE


@given(KEYS, STREAMS, st.integers(0, 63), st.integers(0, 31), st.integers(1, 5))
@settings(max_examples=15)
def test_streams_samples_seeds_and_neighbours_are_independent(
    seed: int, stream: int, seed_bit: int, stream_bit: int, lag: int
) -> None:
    """Six draws that differ in as little as they can, at p = 1/2: all 64 outcomes are equally likely."""
    logits = torch.zeros(N)
    own = bits(logits, seed, 2, stream)
    draws = torch.stack(
        [
            own[0],
            own[1],
            own[0].roll(lag),
            bits(logits, seed ^ 1 << seed_bit, 1, stream)[0],
            bits(logits, seed, 1, stream ^ 1 << stream_bit)[0],
            bits(logits, seed ^ 1 << seed_bit, 2, stream ^ 1 << stream_bit)[1],
        ]
    )
    cells = (draws.long() << torch.arange(6).unsqueeze(1)).sum(0)
    # Outcomes `lag` apart share a draw; every 2 * lag-th one is of draws of its own.
    for first in range(2 * lag):
        assert chi_square(cells[first :: 2 * lag], 64) <= limit(63)


@given(KEYS, STREAMS, st.integers(1, 4))
@settings(max_examples=15)
def test_noise_is_finite_and_its_uniforms_are_spread(seed: int, stream: int, samples: int) -> None:
    key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    k = reference.uniform24(N, key, samples, stream)
    assert int(k.min()) >= 0 and int(k.max()) < 2**24
    for row in k:
        assert chi_square(row >> 18, 64) <= limit(63) and chi_square(row & 63, 64) <= limit(63)
    for dtype in (torch.float32, torch.float64):
        noise = reference.noise(N, key, samples, stream, dtype)
        # log(2^25 - 1), where k is 0 or 2^24 - 1.
        assert noise.isfinite().all() and noise.abs().max() <= 17.4


@given(KEYS, STREAMS)
@settings(max_examples=3)
def test_every_bit_of_the_seed_and_of_the_stream_counts(seed: int, stream: int) -> None:
    logits = torch.zeros(N)
    own = bits(logits, seed, stream=stream)
    flipped = [bits(logits, seed ^ 1 << i, stream=stream) for i in range(64)]
    flipped += [bits(logits, seed, stream=stream ^ 1 << i) for i in range(32)]
    # Hoeffding: P(|agreement - 1 / 2| > t) <= 2 exp(-2 N t^2).
    t = math.sqrt((RARE + math.log(2)) / (2 * N))
    for other in flipped:
        assert abs((own == other).double().mean().item() - 0.5) <= t
