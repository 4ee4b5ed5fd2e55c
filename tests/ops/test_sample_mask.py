"""sample_mask: the published Philox vectors, the sigmoid, the distribution, and the seed's contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing

from fastmask import ops
from fastmask.ops.sample_mask import reference
from fastmask.testing import ADVERSARIAL_SHAPES, non_contiguous, opcheck, values

# Known answers for Philox4x32-10: counter, key, words. Source: the kat_vectors of Random123
# (Salmon et al., SC 2011).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def seed_2026() -> torch.Tensor:
    """A seed on the default device, which is another in each test."""
    return torch.tensor(2026)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, written from the paper's round function."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def bits_of(logits: torch.Tensor, **options: object) -> torch.Tensor:
    return ops.unpack(ops.sample_mask(logits, **options), logits.shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    c = tuple(torch.tensor([word]) for word in counter)
    k = tuple(torch.tensor([word]) for word in key)
    assert reference.philox(c, k)[0].tolist() == list(words)  # type: ignore[arg-type]
    assert plain_philox(list(counter), list(key)) == list(words)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_counter_and_key_of_the_contract(seed: int) -> None:
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    k = reference.uniform24(11, signed, samples=3, stream=7)
    for sample in range(3):
        for e in range(11):
            words = plain_philox([e // 4, 0, sample, 7], [seed % 2**32, seed >> 32])
            assert k[sample, e] == words[e % 4] >> 8


def test_sigmoid_is_within_two_counts_of_the_exact_one() -> None:
    logits = torch.linspace(-45, 45, 400_001)
    exact = torch.sigmoid(logits.double())
    # Half a count from the polynomial (1.4e-7 relative of z, times z / (1 + z)^2 <= 1/4), and float32
    # rounding of z, 1 + z and the quotient: each at most 2^-24 of a value below 1.
    error = (reference.sigmoid(logits).double() - exact).abs().max().item()
    assert error * 2**24 <= 0.25 * 1.4e-7 * 2**24 + 3
    # Equal products of one sequence of rounded steps: nothing but the sign chooses the branch.
    p = reference.sigmoid(logits)
    assert torch.equal(p, reference.sigmoid(non_contiguous(logits)))


def test_threshold_at_the_edges() -> None:
    inf, nan = float("inf"), float("nan")
    edge = torch.tensor([0.0, -0.0, inf, -inf, nan, 100.0, -100.0, 18.0, -18.0])
    got = reference.threshold(edge).tolist()
    assert got[:7] == [2**23, 2**23, 2**24, 0, 0, 2**24, 0]
    assert got[7] == 2**24
    assert got[8] == 0
    low = reference.threshold(torch.linspace(-40, 40, 100_001)).diff()
    assert low.min() >= -2, "the threshold must rise with the logit but for rounding"


@pytest.mark.parametrize("logit", [-6.0, -2.0, -0.3, 0.0, 1.0, 4.0])
def test_probability_is_the_sigmoid(logit: float) -> None:
    n = 400_000
    ones = bits_of(torch.full((n,), logit), seed=11).sum().item()
    p = 1 / (1 + math.exp(-logit))
    assert abs(ones / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_noise_is_logistic() -> None:
    n = 200_000
    noise = reference.noise(n, seed_2026(), 1, 0, torch.float64)[0]
    assert noise.isfinite().all()
    # Kolmogorov-Smirnov: P(D > 1.95 / sqrt(n)) = 0.001.
    cdf = torch.sigmoid(noise.sort().values)
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (cdf - empirical).abs().max() < 1.95 / math.sqrt(n)
    # Mean 0 and variance pi^2 / 3; var of the sample variance is (mu4 - var^2) / n, mu4 = 7 pi^4 / 15.
    variance = math.pi**2 / 3
    assert abs(noise.mean()) < 5 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 5 * math.sqrt((7 * math.pi**4 / 15 - variance**2) / n)


def test_noise_is_finite_and_symmetric_at_both_ends() -> None:
    k = torch.tensor([0, 2**24 - 1, 2**23 - 1, 2**23])
    high = torch.log((2**25 - 1 - 2 * k).float()) - torch.log((2 * k + 1).float())
    assert high.isfinite().all()
    assert high[0] == -high[1]
    assert high[2] == -high[3]


@pytest.mark.parametrize("logit, expected", [(0.0, 1 / 6), (2.0, 0.11333), (-2.0, 0.11333)])
def test_mean_slope_of_the_relaxed_sample(logit: float, expected: float) -> None:
    s = torch.sigmoid(logit + reference.noise(400_000, seed_2026(), 1, 0, torch.float64))
    slope = s * (1 - s)
    error = slope.std() / math.sqrt(slope.numel())
    assert abs(slope.mean() - expected) < 5 * error + 5e-6  # the oracle has five digits


def test_the_bit_is_the_sign_of_logit_plus_noise() -> None:
    logits = values(50_000, seed=3) * 3
    noise = reference.noise(50_000, seed_2026(), 1, 0, torch.float64)[0]
    relaxed = logits.double() + noise
    bits = bits_of(logits, seed=2026)[0]
    # The threshold is floored and its sigmoid rounded: within 3 counts of 2^24 either side may win.
    k = reference.uniform24(50_000, seed_2026(), 1, 0)[0]
    near = (k - torch.sigmoid(logits.double()) * 2**24).abs() < 4
    assert torch.equal(bits[~near], relaxed[~near] > 0)
    assert near.sum() < 10


@pytest.mark.parametrize("shape", [*ADVERSARIAL_SHAPES, (0, 3), ()])
def test_same_seed_same_bits_in_any_split(shape: tuple[int, ...]) -> None:
    logits = values(*shape)
    four = ops.sample_mask(logits, seed=5, samples=4)
    assert four.shape == (4, -(-logits.numel() // 64) * 8)
    assert torch.equal(ops.sample_mask(logits, seed=5, samples=4), four)
    assert torch.equal(ops.sample_mask(logits, seed=5, samples=1)[0], four[0])
    assert torch.equal(ops.sample_mask(non_contiguous(logits), seed=5, samples=4), four)


def test_threads_do_not_matter() -> None:
    logits, before = values(300_001), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.sample_mask(logits, seed=9)
        torch.set_num_threads(4)
        assert torch.equal(ops.sample_mask(logits, seed=9), one)
    finally:
        torch.set_num_threads(before)


def test_seeds_streams_and_samples_are_independent() -> None:
    n = 100_000
    logits = torch.zeros(n)
    draws = [
        bits_of(logits, seed=1)[0], bits_of(logits, seed=2)[0], bits_of(logits, seed=2**40 + 1)[0],
        bits_of(logits, seed=1, stream=1)[0], bits_of(logits, seed=1, samples=2)[1],
    ]  # fmt: skip
    signs = torch.stack(draws).double() * 2 - 1
    signs = torch.cat([signs, signs[:1].roll(1), signs[:1].roll(4)])
    correlation = (signs @ signs.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_manual_seed_rules_and_draws_differ() -> None:
    logits = torch.zeros(1000)
    torch.manual_seed(4)
    first, second = ops.sample_mask(logits), ops.sample_mask(logits)
    torch.manual_seed(4)
    assert torch.equal(ops.sample_mask(logits), first)
    assert not torch.equal(first, second)


def test_drawn_seeds_use_all_64_bits() -> None:
    torch.manual_seed(0)
    seeds = [int(ops.draw_seed(torch.empty(0))) % 2**64 for _ in range(200)]
    assert len(set(seeds)) == 200
    for bit in range(64):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 100 - 5 * math.sqrt(50) < ones < 100 + 5 * math.sqrt(50), f"bit {bit}"


def test_a_seed_tensor_is_read_as_bits() -> None:
    logits = values(100)
    assert torch.equal(
        ops.sample_mask(logits, seed=2**64 - 3), ops.sample_mask(logits, seed=torch.tensor(-3))
    )


def test_compiled_code_draws_what_eager_draws_without_recompiling() -> None:
    logits = values(37, 45)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda logits: ops.sample_mask(logits, samples=2), fullgraph=True, backend=counter
    )
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        eager = ops.sample_mask(logits, samples=2)
        torch.manual_seed(seed)
        assert torch.equal(compiled(logits), eager)
    assert counter.frame_count == 1


def test_opcheck() -> None:
    args = (values(37, 45), seed_2026(), 3, 0, "auto")
    opcheck(torch.ops.fastmask.sample_mask, args)


def test_what_it_refuses() -> None:
    logits = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"seed: expected a whole number in \[0, 2\*\*64\), got -1"
    ):
        ops.sample_mask(logits, seed=-1)
    with pytest.raises(ValueError, match="seed"):
        ops.sample_mask(logits, seed=2**64)
    with pytest.raises(TypeError, match=r"seed: expected a 0-d int64 tensor, got torch.float32"):
        ops.sample_mask(logits, seed=torch.tensor(1.0))
    with pytest.raises(
        TypeError, match="seed: expected a whole number, a tensor or None, got float"
    ):
        ops.sample_mask(logits, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        ops.sample_mask(logits, samples=0)
    with pytest.raises(ValueError, match=r"stream: expected a whole number in \[0, 2\*\*32\)"):
        ops.sample_mask(logits, stream=2**32)
    with pytest.raises(TypeError, match="logits: expected dtype float32"):
        ops.sample_mask(torch.zeros(5, dtype=torch.int64))
