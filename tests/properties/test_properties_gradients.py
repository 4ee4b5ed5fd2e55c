"""Products and gradients of masked layers, exactly: operands are small whole numbers.

Sums of products of whole numbers below 2^53, in float32 below 2^24, are exact in any order, so that a wrong
term shows as an inequality and no tolerance is needed, whatever back end computes them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmask import ops
from fastmask.ops.sample_mask import reference as sampling
from fastmask.testing import generator

SEEDS = st.integers(0, 2**32)
SIDES = st.integers(1, 8)
# On and off the 64 bits of a word and the lanes of a vector.
WIDER = SIDES | st.sampled_from([31, 64, 70, 128])
SAMPLES = st.sampled_from([1, 2, 4])
DTYPES = st.sampled_from([torch.float64, torch.float32])
OFF = st.sampled_from(["zero", "flip"])


def whole(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers in [-8, 8]."""
    return torch.randint(-8, 9, shape, generator=generator(seed)).to(dtype)


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return whole(*shape, seed=seed, dtype=dtype).requires_grad_()


def selected(weight: Tensor, ones: Tensor, off: str = "zero") -> Tensor:
    return torch.where(ones, weight, -weight if off == "flip" else torch.zeros_like(weight))


def equal(got: Any, want: Any) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@given(WIDER, WIDER, SAMPLES, st.integers(0, 3), st.booleans(), SEEDS, DTYPES)
def test_masked_linear_is_linear_of_the_selected_weight(
    n: int, k: int, samples: int, rows: int, with_bias: bool, seed: int, dtype: torch.dtype
) -> None:
    x, w = leaf(samples * rows, k, seed=seed, dtype=dtype), leaf(n, k, seed=seed + 1, dtype=dtype)
    bias = leaf(n, seed=seed + 2, dtype=dtype) if with_bias else None
    ones = torch.rand(samples, n, k, generator=generator(seed)) < 0.5
    active = torch.stack([ops.pack(mask) for mask in ones])
    y = ops.masked_linear(x, w, active, bias)
    parts = [F.linear(p, selected(w, b), bias) for p, b in zip(x.chunk(samples), ones, strict=True)]
    want = torch.cat(parts) if rows else y.new_zeros(0, n)
    assert torch.equal(y, want)
    if rows:
        dy = whole(*y.shape, seed=seed + 3, dtype=dtype)
        leaves = [t for t in (x, w, bias) if t is not None]
        equal(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy))


@given(WIDER, WIDER, st.integers(1, 4), st.integers(0, 9), SEEDS, DTYPES)
def test_a_row_sees_its_own_mask_alone(
    n: int, k: int, tasks: int, rows: int, seed: int, dtype: torch.dtype
) -> None:
    x, w = leaf(rows, k, seed=seed, dtype=dtype), leaf(n, k, seed=seed + 1, dtype=dtype)
    ones = torch.rand(tasks, n, k, generator=generator(seed)) < 0.5
    groups = torch.randint(tasks, (rows,), generator=generator(seed))
    active = torch.stack([ops.pack(mask) for mask in ones])
    y = ops.masked_linear(x, w, active, groups=groups)
    for row in range(rows):
        assert torch.equal(y[row], F.linear(x[row], selected(w, ones[groups[row]])))
    # An entry that no row's mask has gets no gradient.
    (dw,) = torch.autograd.grad(y.sum(), w) if rows else (torch.zeros_like(w),)
    used = ones[groups].any(0) if rows else torch.zeros(n, k, dtype=torch.bool)
    assert not dw[~used].any()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Shapes of x and weight, and stride, padding, dilation, groups, each its own in height and width."""
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in "hw"]
    dilation = [draw(st.integers(1, 2)) for _ in "hw"]
    stride = [draw(st.integers(1, 3)) for _ in "hw"]
    padding: list[int] | str = [draw(st.integers(0, 2)) for _ in "hw"]
    size = [draw(st.integers(1, 7)) for _ in "hw"]
    if draw(st.booleans()):
        padding, stride = "same", [1, 1]
    else:
        for side, r, d, p in zip(size, kernel, dilation, padding, strict=True):
            assume(side + 2 * p >= d * (r - 1) + 1)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (channels, *size), (out, channels // groups, *kernel), how


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions(), SAMPLES, st.booleans(), SEEDS, DTYPES)
def test_masked_conv2d_is_conv2d_of_the_selected_weight(
    shapes: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]],
    samples: int,
    with_bias: bool,
    seed: int,
    dtype: torch.dtype,
) -> None:
    image, kernel, how = shapes
    x = leaf(2 * samples, *image, seed=seed, dtype=dtype)
    w = leaf(*kernel, seed=seed + 1, dtype=dtype)
    bias = leaf(kernel[0], seed=seed + 2, dtype=dtype) if with_bias else None
    ones = torch.rand(samples, *kernel, generator=generator(seed)) < 0.5
    active = torch.stack([ops.pack(mask) for mask in ones])
    y = ops.masked_conv2d(x, w, active, bias, **how)
    want = torch.cat(
        [
            F.conv2d(part, selected(w, mask), bias, **how)
            for part, mask in zip(x.chunk(samples), ones, strict=True)
        ]
    )
    assert torch.equal(y, want)
    dy = whole(*y.shape, seed=seed + 3, dtype=dtype)
    leaves = [t for t in (x, w, bias) if t is not None]
    equal(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy))


@given(WIDER, WIDER, st.integers(1, 4), st.sampled_from(["threshold", "topk"]), OFF, SEEDS, DTYPES)
def test_a_score_learns_by_what_its_bit_would_change(
    n: int, k: int, rows: int, method: str, off: str, seed: int, dtype: torch.dtype
) -> None:
    """dL/dscore = (W - off) * dL/dW', for inactive entries too: W' = where(b, W, off)."""
    shapes = ((rows, k), (n, k), (n, k))
    x, w, scores = (leaf(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes))
    options: dict[str, Any] = {"mu": 1.0} if method == "threshold" else {"density": 0.4}
    bits = ops.pack(scores, 1.0) if method == "threshold" else ops.topk_mask(scores, 0.4)
    ones = ops.unpack(bits, (n, k))
    effective = selected(w, ones, off).detach().requires_grad_()
    dy = whole(rows, n, seed=seed + 3, dtype=dtype)
    dx_want, g = torch.autograd.grad(F.linear(x, effective), [x, effective], dy)
    y = ops.learned_linear(x, w, scores, method=method, off=off, **options)
    assert torch.equal(y, F.linear(x, effective))
    dx, dw, dscores = torch.autograd.grad(y, [x, w, scores], dy)
    off_value = -w if off == "flip" else torch.zeros_like(w)
    equal((dx, dw, dscores), (dx_want, selected(g, ones, off), (w - off_value) * g))


@given(convolutions(), OFF, SEEDS)
@settings(max_examples=30)
def test_a_score_of_a_convolution_learns_by_the_same_rule(
    shapes: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], off: str, seed: int
) -> None:
    image, kernel, how = shapes
    x, w, scores = (leaf(*s, seed=seed + i) for i, s in enumerate(((2, *image), kernel, kernel)))
    ones = scores.detach() > 1
    effective = selected(w, ones, off).detach().requires_grad_()
    want = F.conv2d(x, effective, **how)
    dy = whole(*want.shape, seed=seed + 3)
    dx_want, g = torch.autograd.grad(want, [x, effective], dy)
    y = ops.learned_conv2d(x, w, scores, method="threshold", mu=1.0, off=off, **how)
    assert torch.equal(y, want)
    dx, dw, dscores = torch.autograd.grad(y, [x, w, scores], dy)
    off_value = -w if off == "flip" else torch.zeros_like(w)
    equal((dx, dw, dscores), (dx_want, selected(g, ones, off), (w - off_value) * g))


EPS = torch.finfo(torch.float64).eps


@given(SIDES, SIDES, SAMPLES, OFF, st.sampled_from([0.25, 1.0, 3.0]), SEEDS)
def test_the_mean_over_samples_is_the_mean_of_single_ones(
    n: int, k: int, samples: int, off: str, tau: float, seed: int
) -> None:
    """Each sample by its own formula: dL/dscore_i = (W - off) * G_i * s(1 - s) / tau."""
    x, w, scores = (leaf(*s, seed=seed + i) for i, s in enumerate(((3, k), (n, k), (n, k))))
    ones = ops.unpack(ops.sample_mask(scores, seed, samples), (n, k))
    y = ops.learned_linear(
        x.repeat(samples, 1), w, scores, seed=seed, samples=samples, tau=tau, off=off
    )
    weights = [selected(w, mask, off).detach().requires_grad_() for mask in ones]
    singles = [F.linear(x, weight) for weight in weights]
    assert torch.equal(y, torch.cat(singles))
    # A power of two: dividing by the number of samples is exact.
    dy = whole(3, n, seed=seed + 3)
    mean = y.view(samples, 3, n).mean(0)
    assert torch.equal(mean, torch.stack(singles).mean(0))
    dx, dw, dscores = torch.autograd.grad(mean, [x, w, scores], dy)
    dx_want, *per_sample = torch.autograd.grad(torch.stack(singles).mean(0), [x, *weights], dy)
    gs = torch.stack(per_sample)
    assert torch.equal(dx, dx_want)
    assert torch.equal(dw, selected(gs, ones, off).sum(0))

    number = sampling.uniform24(n * k, torch.tensor(seed), samples, 0).view(samples, n, k).double()
    noise = torch.log((2**25 - 1 - 2 * number) / (2 * number + 1))
    z = (scores.detach() + noise) / tau
    slope = torch.sigmoid(z) * torch.sigmoid(-z) / tau
    db = (w - (-w if off == "flip" else torch.zeros_like(w))).detach() * gs
    # db is exact. |d ln(slope) / dz| <= 1, so an error in z is a relative error of the slope: logit and two
    # logarithms, at most 8 + 2 * 17.4 < 43, two roundings each, over tau. The sigmoids and products add
    # fewer than 16 roundings, the sum over samples one a term. Twice: here and there.
    relative = 2 * (2 * 43 / tau + 16 + samples) * EPS
    assert ((dscores - (db * slope).sum(0)).abs() <= relative * (db * slope).abs().sum(0)).all()


@given(SIDES, SIDES, st.integers(0, 2**32), st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]))
def test_gradients_are_finite_where_a_mask_is_all_zeros_or_all_ones(
    n: int, k: int, seed: int, tau: float
) -> None:
    x, w = whole(3, k, seed=seed).float(), whole(n, k, seed=seed + 1).float()
    for logit in (-100.0, 0.0, 100.0):
        scores = torch.full((n, k), logit, requires_grad=True)
        y = ops.learned_linear(x, w, scores, seed=seed, tau=tau)
        if logit:
            assert torch.equal(y, F.linear(x, w) if logit > 0 else torch.zeros_like(y))
        (grad,) = torch.autograd.grad(y.square().sum() + y.sum(), scores)
        assert grad.isfinite().all()
