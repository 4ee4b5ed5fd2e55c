"""masked_conv2d and learned_conv2d in the interpreter: weights by the kernels, products by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask._triton import launch, weights
from fastmask.ops.learned_conv2d import reference as learned_reference
from fastmask.ops.masked_conv2d import triton
from fastmask.ops.masked_linear.reference import select
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAST = torch.channels_last
# Shapes of x and of the weight, and the options of the convolution.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one": ((2, 1, 1, 1), (1, 1, 1, 1), {}),
    "plain": ((2, 3, 6, 7), (5, 3, 3, 3), {"padding": 1}),
    "strided": (
        (2, 4, 9, 7),
        (5, 4, 3, 2),
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
    ),
    "depthwise": ((2, 5, 9, 7), (5, 1, 3, 3), {"groups": 5, "stride": 2, "padding": 1}),
    "1x1": ((2, 13, 5, 3), (9, 13, 1, 1), {}),
    "1x1 aligned": ((2, 16, 2, 3), (9, 16, 1, 1), {}),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_selected_weights_have_their_bits(
    dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: wide)
    shapes = [*ADVERSARIAL_SHAPES, (5, 3, 3, 2), (2, 8, 3, 3), (3, 1, 5, 5), (0, 3)]
    for shape in shapes:
        w, m = values(*shape, dtype=dtype), mask(3, *shape, seed=1)
        w = torch.where(m.any(0), w, float("nan"))
        bits = torch.stack([ops.pack(one) for one in m])
        want = select(w, bits)
        for kept in (
            w,
            non_contiguous(w),
            w.to(memory_format=LAST) if w.dim() == 4 else w.T.contiguous().T,
        ):
            with poisoned_memory():
                got = weights.select(kept, bits)
            for mine, theirs in zip(got, want, strict=True):
                assert_same_bits(mine.contiguous(), theirs)
        if dtype == torch.bfloat16:
            continue  # which the interpreter negates and rounds wrongly
        w, a = w.nan_to_num(), torch.tensor([0.5, 3.0, 1.25])
        for flip in (False, True):
            chosen = torch.where(m, w, -w if flip else w.new_zeros(()))
            scaled = (chosen * a.view(-1, *[1] * w.dim())).to(dtype)
            for mine, theirs in zip(weights.select(w, bits, flip, a), scaled, strict=True):
                assert_same_bits(mine, theirs)


def run(x: Tensor, w: Tensor, bits: Tensor, b: Tensor, backend: str, **where: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = ops.masked_conv2d(*leaves[:2], bits, leaves[2], backend=backend, **where)
    grad = values(*y.shape, seed=9, dtype=torch.bfloat16).to(y.dtype)
    last = y.is_contiguous(memory_format=LAST) and not y.is_contiguous()
    grad = grad.to(memory_format=LAST) if last else grad
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype, samples: int) -> None:
    (B, *image), shape, where = CASES[case]
    x, w = (values(*s, seed=s[0], dtype=torch.float16) for s in ((B * samples, *image), shape))
    b, m = values(shape[0], seed=5, dtype=torch.float16), mask(samples, *shape, seed=1)
    bits, masked_out = torch.stack([ops.pack(one) for one in m]), ~m.any(0)
    exact = run(x.double(), w.double(), bits, b.double(), "reference", **where)
    x, w, b = (t.to(dtype) for t in (x, w, b))
    plain = run(x, w, bits, b, "reference", **where)
    spoiled = torch.where(masked_out, torch.tensor(float("nan"), dtype=dtype), w)
    for images, kept in ((x, spoiled), (x.to(memory_format=LAST), spoiled.to(memory_format=LAST))):
        with poisoned_memory():
            ours = run(images, kept, bits, b, "triton", **where)
        for mine, theirs, true in zip(ours, plain, exact, strict=True):
            assert_within_budget(mine, theirs, true)
        assert (ours[2][masked_out] == 0).all()
        assert ours[0].stride() == run(images, kept, bits, b, "reference", **where)[0].stride()


LEARNED: dict[str, dict[str, Any]] = {
    "gumbel": {"method": "gumbel", "seed": 7, "samples": 2, "tau": 0.7},
    "gumbel flip": {"method": "gumbel", "seed": 2**63, "samples": 2, "off": "flip"},
    "threshold": {"method": "threshold", "mu": 0.1},
    "threshold scale": {"method": "threshold", "scale": "rsqrt_density"},
    "topk flip": {"method": "topk", "density": 0.4, "off": "flip"},
}


def learn(leaves: list[Tensor], backend: str, options: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of x, weight, scores and bias."""
    x, w, scores, b = (t.detach().requires_grad_() for t in leaves)
    y = ops.learned_conv2d(x, w, scores, bias=b, backend=backend, **options)
    grad = values(*y.shape, seed=9, dtype=torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, w, scores, b), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED)
def test_learned_masks(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one entry the plain error may be 0 by chance, which makes it no measure of rounding to float16.
    for case in ("strided", "depthwise", "one")[: 3 if dtype == torch.float32 else 2]:
        x_size, w_size, where = CASES[case]
        how = {**where, **options}
        halves = [values(*s, seed=i, dtype=torch.float16) for i, s in enumerate((x_size, w_size))]
        b, scores = values(w_size[0], seed=5, dtype=torch.float16), values(*w_size, seed=2).abs()
        # An entry that counts has to be there: the scale of a mask with no ones is not of interest here.
        scores = (
            torch.where(mask(*w_size, seed=3), scores, -scores) if scores.numel() > 1 else scores
        )
        exact = learn(
            [*(t.double() for t in halves), scores.double(), b.double()], "reference", how
        )
        leaves = [*(t.to(dtype) for t in halves), scores, b.to(dtype)]
        with monkeypatch.context() as patch:
            # What plain torch does: gradients of the weight have the dtype of the images.
            patch.setattr(learned_reference, "wide", lambda grad, *_: grad.dtype)
            plain = learn(leaves, "reference", how)
        last = [t.to(memory_format=LAST) if t.dim() == 4 else t for t in leaves]
        for given in (leaves, last):
            with poisoned_memory():
                ours = learn(given, "triton", how)
            for mine, theirs, true in zip(ours, plain, exact, strict=True):
                assert_within_budget(mine, theirs.to(mine.dtype), true)


@pytest.mark.parametrize("wide", [False, True])
def test_bits_drawn_with_the_weights(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "wide", lambda _numel: wide)
    for shape in [*ADVERSARIAL_SHAPES, (5, 3, 3, 2)]:
        w, scores, seed = values(*shape), values(*shape, seed=1), torch.tensor(-5)
        want = ops.sample_mask(scores, seed=seed, samples=3, backend="reference")
        above = ops.pack(scores, 0.25, backend="reference")
        with poisoned_memory():
            chosen, bits = weights.draw(w, scores, seed, 3, 0.0, False)
            over, ones = weights.draw(w, scores, None, 1, 0.25, False)
        assert torch.equal(bits, want) and torch.equal(ones[0], above)
        for mine, theirs in zip(
            [*chosen, *over], [*select(w, want), *select(w, ones)], strict=True
        ):
            assert_same_bits(mine, theirs)


def test_a_convolution_of_one_place_is_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In channels_last alone, where the pixels of images are rows."""
    x, w = values(2, 16, 2, 3), values(9, 16, 1, 1)
    bits = ops.pack(w > 0)
    taken = []
    monkeypatch.setattr(triton, "conv2d", lambda *a: taken.append("torch") or x)
    for images, kernel, where, path in (
        (x, w, {}, ["torch"]),
        (x.to(memory_format=LAST), w, {}, []),
        (x.to(memory_format=LAST), w, {"stride": 2}, ["torch"]),
        (x.to(memory_format=LAST), w, {"padding": 1}, ["torch"]),
        (x.repeat(8, 1, 1, 1).to(memory_format=LAST), w, {}, ["torch"]),
    ):
        taken.clear()
        ops.masked_conv2d(images, kernel, bits, backend="triton", **where)
        assert taken == path, (images.shape, where)
