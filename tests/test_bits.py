"""BitMask: the layout, the algebra of sets, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmask import BitMask

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=23))


@given(MASKS)
def test_bits_are_those_of_numpy_packbits(array: np.ndarray) -> None:
    packed = np.packbits(array.ravel(), bitorder="little")
    mask = BitMask.from_bool(array)
    assert mask.nbytes == -(-array.size // 64) * 8
    assert mask.bits.numpy()[: packed.size].tolist() == packed.tolist()
    assert not mask.bits[packed.size :].any()
    assert np.array_equal(mask.to_bool().numpy(), array)
    assert mask.shape == array.shape
    assert mask.count() == array.sum()


@given(MASKS, st.randoms(use_true_random=False))
def test_algebra_agrees_with_bools(array: np.ndarray, random: object) -> None:
    other = np.array([random.random() < 0.5 for _ in range(array.size)], bool).reshape(array.shape)  # type: ignore[attr-defined]
    a, b = BitMask.from_bool(array), BitMask.from_bool(other)
    pairs = [
        (a & b, array & other), (a | b, array | other), (a ^ b, array ^ other),
        (~a, ~array), (a - b, array & ~other),
    ]  # fmt: skip
    for got, want in pairs:
        assert got == BitMask.from_bool(want)
    assert a.hamming(b) == (array ^ other).sum()
    union = (array | other).sum()
    assert a.iou(b) == ((array & other).sum() / union if union else 1.0)
    assert a.density == (array.mean() if array.size else 0.0)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 128, 130])
def test_ones_and_zeros_have_clean_padding(numel: int) -> None:
    assert BitMask.ones((numel,)).count() == numel
    assert BitMask.zeros((numel,)).count() == 0
    assert ~BitMask.ones((numel,)) == BitMask.zeros((numel,))


def test_logical_order_whatever_the_strides() -> None:
    array = torch.arange(24).view(2, 3, 4) % 5 == 0
    assert BitMask.from_bool(array.transpose(0, 2)) == BitMask.from_bool(
        array.transpose(0, 2).contiguous()
    )
    image = torch.rand(2, 3, 4, 5) > 0.5
    assert BitMask.from_bool(image.to(memory_format=torch.channels_last)) == BitMask.from_bool(
        image
    )
    assert BitMask.from_bool(torch.tensor([True]).expand(70)).count() == 70


def test_numbers_zero_and_one_are_a_mask_and_others_are_not() -> None:
    assert BitMask.from_bool([0, 1, 1]).count() == 2
    assert BitMask.from_bool(torch.tensor([0.0, 1.0])).count() == 1
    with pytest.raises(ValueError, match=r"mask: expected bools or numbers 0 and 1, got 0\.5"):
        BitMask.from_bool(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="got nan"):
        BitMask.from_bool(torch.tensor([float("nan")]))


def test_what_the_constructor_refuses() -> None:
    with pytest.raises(TypeError, match=r"bits: expected dtype torch.uint8, got torch.bool"):
        BitMask(torch.zeros(8, dtype=torch.bool), (3,))
    with pytest.raises(TypeError, match="bits: expected a torch.Tensor, got list"):
        BitMask([0] * 8, (3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits: expected \(8,\) bytes for shape \(3, 4\)"):
        BitMask(torch.zeros(2, dtype=torch.uint8), (3, 4))
    dirty = torch.zeros(8, dtype=torch.uint8)
    dirty[1] = 1
    with pytest.raises(ValueError, match="padding bits after element 6 to be 0"):
        BitMask(dirty, (7,))


def test_masks_of_other_shapes_do_not_mix() -> None:
    a, b = BitMask.ones((2, 3)), BitMask.ones((3, 2))
    assert a != b
    with pytest.raises(ValueError, match=r"expected a mask of shape \(2, 3\), got \(3, 2\)"):
        _ = a & b
    with pytest.raises(TypeError, match="expected a BitMask, got bool"):
        _ = a | True  # type: ignore[operator]


def test_copies_and_moves_keep_the_mask() -> None:
    a = BitMask.from_bool(torch.rand(37, 45) > 0.5)
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), a.to("cpu"), a.clone()):
        assert a == b
    assert a.clone().bits.data_ptr() != a.bits.data_ptr()
    assert a.to("meta").shape == a.shape
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    assert "density=" in repr(a) and "shape=(37, 45)" in repr(a)
    assert "meta" in repr(a.to("meta"))


def test_a_scalar_and_an_empty_mask() -> None:
    assert BitMask.from_bool(torch.tensor(True)).count() == 1
    empty = BitMask.from_bool(torch.zeros(0, 5, dtype=torch.bool))
    assert empty.nbytes == 0 and empty.density == 0.0 and (~empty).count() == 0
