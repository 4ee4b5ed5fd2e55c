"""The masked weight itself: the one that linear and conv2d read, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
X, WEIGHT = values(4, 45), values(37, 45, seed=1)


def owned(kind: str) -> ScoreMask:
    """A mask of WEIGHT whose scores are spread on both sides of its cut."""
    made = TEMPLATES[kind]().for_weight(WEIGHT)
    with torch.no_grad():
        made.own_scores().copy_(values(*WEIGHT.shape, seed=9))
    return made


@every
@pytest.mark.parametrize("mode", [True, False])
def test_it_is_the_weight_that_linear_reads(kind: str, mode: bool) -> None:
    made = owned(kind).train(mode)
    torch.manual_seed(5)
    weights = made.effective(WEIGHT)
    torch.manual_seed(5)
    y = made.linear(X, WEIGHT).detach()
    assert weights.shape == (2 if kind == "gumbel" and mode else 1, 37, 45)
    parts = list(zip(X.chunk(len(weights)), weights.detach(), strict=True))
    plain = torch.cat([x @ w.T for x, w in parts])
    exact = torch.cat([x.double() @ w.double().T for x, w in parts])
    assert_within_budget(y, plain, exact)
    assert weights.requires_grad == mode
    if mode:
        weights.square().sum().backward()
        assert made.own_scores().grad.any()


@every
def test_evaluation_draws_nothing_and_selects(kind: str) -> None:
    made = owned(kind).eval()
    before = torch.get_rng_state()
    weight = torch.where(made.active().to_bool(), WEIGHT, torch.nan)
    (product,) = made.effective(weight if made.off == "zero" else WEIGHT)
    assert torch.equal(torch.get_rng_state(), before)
    assert product.isfinite().all()
    ones = made.active().to_bool()
    off = -WEIGHT if made.off == "flip" else torch.zeros(())
    selected = torch.where(ones, WEIGHT, off)
    if made.scale:
        selected = selected * torch.sqrt(ones.numel() / ones.sum().float())
    assert_same_bits(product, selected)


def test_fixed_bits_leave_gradients_to_active_weights() -> None:
    bits = mask(37, 45)
    made, weight = FixedMask(BitMask.from_bool(bits)), WEIGHT.clone().requires_grad_()
    for mode in (True, False):
        (product,) = made.train(mode).effective(weight)
        assert_same_bits(product.detach(), torch.where(bits, WEIGHT, 0.0))
    product.sum().backward()
    assert torch.equal(weight.grad, bits.float())
    made.bits.copy_(ops.pack(~bits))
    assert_same_bits(made.effective(weight)[0].detach(), torch.where(bits, 0.0, WEIGHT))


def test_a_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="expected the mask of a weight, got a template; make one"):
        GumbelMask().effective(WEIGHT)
