"""pack, unpack, popcount and sample_mask in the interpreter: the reference's bits, all of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastmask import _backend, ops
from fastmask._triton import launch, philox
from fastmask.ops.sample_mask import reference
from fastmask.testing import ADVERSARIAL_SHAPES, mask, non_contiguous, poisoned_memory, values

SHAPES = [*ADVERSARIAL_SHAPES, (0, 5), (), (4097,)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@triton.jit
def estimates(logits_ptr, k_ptr, out_ptr, BLOCK: tl.constexpr, NEAR: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    ones = philox.drawn(tl.load(logits_ptr + at), tl.load(k_ptr + at), NEAR)
    tl.store(out_ptr + at, ones.to(tl.uint8))


@triton.jit
def thresholds(logits_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, philox.threshold(tl.load(logits_ptr + at)))


@triton.jit
def words(seed_ptr, out_ptr, first, Q: tl.constexpr):  # type: ignore[no-untyped-def]
    quad = first + tl.arange(0, Q).to(tl.int64)
    at = tl.arange(0, Q)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + at, philox.uniform24(tl.load(seed_ptr), quad, 2, 5, True))


@pytest.fixture(params=[False, True], ids=["32-bit", "64-bit"])
def offsets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of both widths."""
    monkeypatch.setattr(launch, "wide", lambda _numel: request.param)


def test_the_interpreter_takes_cpu_tensors_by_name_alone() -> None:
    cpu = torch.device("cpu")
    assert _backend.missing("triton") is None
    assert _backend.resolve("pack", "triton", cpu).__name__ == "fastmask.ops.pack.triton"
    assert "triton" not in _backend.resolve("pack", "auto", cpu).__name__


@pytest.mark.usefixtures("offsets")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bools(shape: tuple[int, ...]) -> None:
    m = mask(*shape)
    bits = ops.pack(m, backend="reference")
    with poisoned_memory():
        assert torch.equal(ops.pack(m, backend="triton"), bits)
        assert torch.equal(ops.unpack(bits, shape, backend="triton"), m)
        assert ops.popcount(bits, backend="triton").item() == m.sum()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_above_a_threshold_strictly(dtype: torch.dtype) -> None:
    edge = torch.tensor([-1.0, -0.0, 0.0, 0.3, 2.0, float("nan"), float("inf"), -float("inf")])
    scores = torch.cat((edge.to(dtype), values(500, dtype=dtype)))
    for mu in (0.0, -0.0, 0.3, -1.0, 1e30):
        with poisoned_memory():
            got = ops.pack(scores, mu, backend="triton")
        assert torch.equal(got, ops.pack(scores, mu, backend="reference")), mu
    assert torch.equal(
        ops.pack(non_contiguous(scores), 0.3, backend="triton"),
        ops.pack(scores, 0.3, backend="reference"),
    )


def test_several_masks() -> None:
    bits = ops.sample_mask(values(45, 131), seed=3, samples=4, backend="reference")
    with poisoned_memory():
        got = ops.unpack(bits, (45, 131), backend="triton")
        ones = ops.popcount(bits, backend="triton")
    assert torch.equal(got, ops.unpack(bits, (45, 131), backend="reference"))
    assert torch.equal(ones, ops.popcount(bits, backend="reference"))
    # Bytes that are not whole masks, and that start off a word.
    odd = torch.arange(256, dtype=torch.uint8)[3:]
    want = ops.popcount(odd, backend="reference")
    assert torch.equal(ops.popcount(odd, backend="triton"), want)


@pytest.mark.usefixtures("offsets")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples(shape: tuple[int, ...]) -> None:
    logits = values(*shape) * 4
    with poisoned_memory():
        got = ops.sample_mask(logits, seed=7, samples=3, stream=9, backend="triton")
    want = ops.sample_mask(logits, seed=7, samples=3, stream=9, backend="reference")
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_samples_of_all_logits_seeds_and_streams(dtype: torch.dtype) -> None:
    special = torch.tensor(
        [0.0, -0.0, 40.0, -40.0, 1e-30, 17.4, float("nan"), torch.inf, -torch.inf]
    )
    logits = torch.cat((special.to(dtype), torch.linspace(-45, 45, 3001, dtype=dtype)))
    for seed, stream in ((0, 0), (2**64 - 5, 2**32 - 1), (2**63, 1), (2**32, 2**31)):
        got = ops.sample_mask(logits, seed=seed, stream=stream, backend="triton")
        want = ops.sample_mask(logits, seed=seed, stream=stream, backend="reference")
        assert torch.equal(got, want), (seed, stream)


def test_thresholds_are_the_reference_s_integers() -> None:
    """Bits compare 24-bit integers, of which a sample sees few: here the thresholds themselves."""
    logits = torch.cat((values(2**17) * 6, torch.linspace(-41, 41, 2**17)))
    out = torch.full(logits.shape, -1, dtype=torch.int32)
    thresholds[(len(logits) // 4096,)](logits, out, BLOCK=4096)
    assert torch.equal(out.long(), reference.threshold(logits))


@pytest.mark.parametrize("near", [philox.NEAR, 2**26])
def test_estimates_decide_as_thresholds_do(near: int) -> None:
    """Integers on either side of the threshold, near it and far from it; all are compared at 2^26."""
    special = torch.tensor([0.0, -0.0, float("nan"), torch.inf, -torch.inf, 17.0, -17.0, 1e30])
    logits = torch.cat((special, values(4096 - len(special)) * 6))
    limit = reference.threshold(logits)
    for step in (-(2**20), -1000, -near, -65, -2, -1, 0, 1, 64, near, 1000, 2**20):
        k = (limit + step).clamp(0, 2**24 - 1).int()
        out = torch.zeros(4096, dtype=torch.uint8)
        estimates[(1,)](logits, k, out, BLOCK=4096, NEAR=near)
        assert torch.equal(out.bool(), k < limit), step


def test_estimates_with_the_worst_rounding_stay_near() -> None:
    """`drawn` in torch, its exp off by 2^-21, twice what is documented of the device's: a quarter of NEAR."""
    logits = torch.cat((values(2**18) * 6, torch.linspace(-41, 41, 2**18)))
    limit = reference.threshold(logits)
    for off in (1 - 2.0**-21, 1.0, 1 + 2.0**-21):
        e = torch.exp(-logits.abs()) * off
        above = torch.where(logits >= 0, torch.tensor(2.0**24), e * 2.0**24)
        # Integers whose bit is certain: the sign may be wrong for none of them.
        for step in (-philox.NEAR // 4, philox.NEAR // 4):
            k = (limit + step).clamp(0, 2**24 - 1)
            wrong = ((above - k.float() * (1 + e)) > 0) != (k < limit)
            assert not wrong[k == limit + step].any()


def test_counters_above_32_bits() -> None:
    """Elements above 2^34 have a second counter word; no tensor here is so large."""
    first, seed = 2**32 - 8, torch.tensor(-77)
    out = torch.empty((16, 4), dtype=torch.int32)
    words[(1,)](seed, out, first, Q=16)
    quad = torch.arange(first, first + 16)
    two, five = torch.tensor(2), torch.tensor(5)
    low = 2**32 - 1
    want = reference.philox((quad & low, quad >> 32, two, five), (seed & low, (seed >> 32) & low))
    assert torch.equal(out.long(), want >> 8)
