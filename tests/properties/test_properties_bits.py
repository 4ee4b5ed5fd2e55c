"""Bits: what any tensor's mask obeys, whatever its shape, strides and values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmask import BitMask, ops
from fastmask.testing import generator, values

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32)
# Numbers on which comparisons go wrong: zeros of both signs, the smallest, infinities, none at all.
ODD = (0.0, -0.0, 5e-324, -1e-45, 1.0, 1e-45, math.inf, -math.inf, math.nan)


def bools(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64) < 0.5


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Scores that need not be contiguous: steps, offsets, permuted and expanded dimensions."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    steps = [draw(st.integers(1, 3)) for _ in sizes]
    offsets = [draw(st.integers(0, 2)) for _ in sizes]
    whole = values(
        *(o + s * n for o, s, n in zip(offsets, steps, sizes, strict=True)), seed=draw(SEEDS)
    )
    cut = tuple(slice(o, o + s * n, s) for o, s, n in zip(offsets, steps, sizes, strict=True))
    view = whole[cut].permute(draw(st.permutations(range(len(sizes)))))
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(draw(st.integers(1, 3)), *view.shape)
    return view


@given(views())
def test_bits_follow_logical_order_and_not_memory(view: Tensor) -> None:
    contiguous = view.clone(memory_format=torch.contiguous_format)
    packed = ops.pack(contiguous, 0.0)
    assert torch.equal(ops.pack(view, 0.0), packed)
    if 0 not in view.stride():
        mask = torch.empty_strided(view.shape, view.stride(), dtype=torch.bool)
        mask.copy_(view > 0)
        assert torch.equal(ops.pack(mask), packed)
    assert torch.equal(ops.unpack(packed, view.shape), contiguous > 0)
    if view.dim() == 4:
        last = view.contiguous(memory_format=torch.channels_last)
        assert torch.equal(ops.pack(last, 0.0), packed)


@given(
    st.lists(st.sampled_from(ODD) | st.floats(width=16), max_size=200),
    st.sampled_from(ODD[:5]) | st.floats(-2, 2),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_scores_count_by_being_above_the_threshold_and_by_nothing_else(
    scores: list[float], mu: float, dtype: torch.dtype
) -> None:
    # The threshold itself is among them, rounded as the scores are.
    held = torch.tensor([*scores, mu], dtype=torch.float64).to(dtype)
    packed = ops.pack(held, mu)
    assert torch.equal(packed, ops.pack(held > mu))
    assert torch.equal(packed, ops.pack(held, mu, backend="reference"))


@given(SHAPES, st.integers(1, 4), SEEDS)
def test_ones_are_counted(shape: tuple[int, ...], samples: int, seed: int) -> None:
    masks = bools((samples, *shape), seed)
    packed = torch.stack([ops.pack(mask) for mask in masks])
    assert torch.equal(ops.popcount(packed), masks.unsqueeze(-1).flatten(1).sum(1))
    a, b = BitMask(packed[0], shape), BitMask(packed[-1], shape)
    assert (a | b).count() + (a & b).count() == a.count() + b.count()
    assert a.hamming(b) == (a - b).count() + (b - a).count()


@given(SHAPES, SEEDS)
def test_the_laws_of_sets_hold_in_the_bits_and_the_padding(
    shape: tuple[int, ...], seed: int
) -> None:
    a, b, c = (BitMask.from_bool(bools(shape, seed + i)) for i in range(3))
    none, every = BitMask.zeros(shape), BitMask.ones(shape)
    # Equality is of all bytes, so of the padding too.
    assert ~~a == a and ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b
    assert a & (b | c) == (a & b) | (a & c) and a - b == a & ~b
    assert (a ^ b) ^ b == a and a ^ a == none and a | ~a == every and ~none == every


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 63), SEEDS)
def test_shards_on_whole_words_are_slices_of_the_bytes(
    words: list[int], rest: int, seed: int
) -> None:
    """A tensor cut after multiples of 64 elements, the last piece of any length."""
    sizes = [64 * n for n in words] + [rest]
    mask = bools((sum(sizes),), seed)
    packed = ops.pack(mask)
    assert torch.equal(torch.cat([ops.pack(piece) for piece in mask.split(sizes)]), packed)
    first = 0
    for size, piece in zip(sizes, mask.split(sizes), strict=True):
        last = first + -(-size // 64) * 8
        assert torch.equal(ops.unpack(packed[first:last], (size,)), piece)
        first = last
    assert first == packed.numel()


@given(st.integers(1, 200), st.data())
@settings(max_examples=30)
def test_a_bit_in_the_padding_is_refused_and_any_other_is_taken(
    numel: int, data: st.DataObject
) -> None:
    size = -(-numel // 64) * 64
    place = data.draw(st.integers(0, size - 1))
    bits = torch.zeros(size // 8, dtype=torch.uint8)
    bits[place // 8] = 1 << place % 8
    if place < numel:
        assert BitMask(bits, (numel,)).to_bool().nonzero().tolist() == [[place]]
    else:
        with pytest.raises(ValueError, match=f"padding bits after element {numel - 1} to be 0"):
            BitMask(bits, (numel,))
