"""Masks over convolutions: the same rule of training and evaluation as over linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmask import BitMask, FixedMask, GumbelMask, ThresholdMask, TopKMask, ops
from fastmask.masks.mask import ScoreMask
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

TEMPLATES: dict[str, Callable[[], ScoreMask]] = {
    "gumbel": lambda: GumbelMask(init=0.5, tau=0.7, samples=2),
    "threshold": lambda: ThresholdMask(init="kaiming", mu=0.01),
    "threshold-scale": lambda: ThresholdMask(init="kaiming", scale="rsqrt_density"),
    "topk-flip": lambda: TopKMask(0.3, "flip", init="magnitude"),
}
every = pytest.mark.parametrize("kind", TEMPLATES)
WHERE: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
X, WEIGHT, BIAS = values(4, 6, 9, 8), values(8, 3, 3, 2, seed=1), values(8, seed=2)


def owned(kind: str) -> ScoreMask:
    """A mask of WEIGHT whose scores are spread on both sides of its cut."""
    made = TEMPLATES[kind]().for_weight(WEIGHT)
    with torch.no_grad():
        made.own_scores().copy_(values(*WEIGHT.shape, seed=9))
    return made


@every
def test_training_is_learned_conv2d(kind: str) -> None:
    made = owned(kind)
    torch.manual_seed(5)
    y = made.conv2d(X, WEIGHT, BIAS, **WHERE)
    torch.manual_seed(5)
    want = ops.learned_conv2d(
        X, WEIGHT, made.own_scores(), bias=BIAS, **WHERE, **made.learned_options()
    )
    assert_same_bits(y, want)
    y.square().sum().backward()
    assert made.own_scores().grad is not None
    assert made.own_scores().grad.any()


@every
def test_evaluation_is_deterministic_and_teaches_nothing(kind: str) -> None:
    made = owned(kind).eval()
    before = torch.get_rng_state()
    y = made.conv2d(X, WEIGHT, BIAS, **WHERE)
    assert torch.equal(torch.get_rng_state(), before)
    assert not y.requires_grad
    bits = made.active().to_bool()

    def plain(dtype: torch.dtype) -> torch.Tensor:
        w = WEIGHT.to(dtype)
        w = torch.where(bits, w, -w if made.off == "flip" else 0)
        w = w / bits.to(dtype).mean().sqrt() if made.scale else w
        return F.conv2d(X.to(dtype), w, BIAS.to(dtype), **WHERE)

    assert_within_budget(y, plain(torch.float32), plain(torch.float64))
    leaf = X.clone().requires_grad_()
    made.conv2d(leaf, WEIGHT, BIAS, **WHERE).sum().backward()
    assert leaf.grad is not None
    assert made.own_scores().grad is None
    if kind != "gumbel":
        assert_same_bits(made.train().conv2d(X, WEIGHT, BIAS, **WHERE).detach(), y)


def test_fixed_bits() -> None:
    active = BitMask.from_bool(mask(*WEIGHT.shape))
    made = FixedMask(active)
    for mode in (True, False):
        y = made.train(mode).conv2d(X, WEIGHT, BIAS, **WHERE)
        assert_same_bits(y, ops.masked_conv2d(X, WEIGHT, active.bits, BIAS, **WHERE))


def test_kaiming_scores_know_the_fan_in_of_a_convolution() -> None:
    scores = TopKMask(0.5).for_weight(values(64, 9, 3, 3)).scores.detach()
    assert 0.9 * 81**-0.5 < scores.abs().max() <= 81**-0.5


def test_a_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="expected the mask of a weight, got a template; make one"):
        GumbelMask().conv2d(X, WEIGHT)
