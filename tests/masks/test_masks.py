"""Mask modules: templates and owned masks, training against evaluation, what is kept where."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import BitMask, FixedMask, GumbelMask, ThresholdMask, TopKMask, ops
from fastmask.masks import Mask
from fastmask.masks.mask import ScoreMask
from fastmask.testing import assert_same_bits, mask, values

NAN = float("nan")
TEMPLATES: dict[str, Callable[[], ScoreMask]] = {
    "gumbel": lambda: GumbelMask(init=0.5, tau=0.7, samples=2),
    "threshold": lambda: ThresholdMask(init="kaiming", mu=0.01),
    "threshold-flip": lambda: ThresholdMask(init="kaiming", off="flip"),
    "threshold-scale": lambda: ThresholdMask(init="kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.3),
    "topk-flip": lambda: TopKMask(0.3, "flip", init="magnitude"),
    "topk-scale": lambda: TopKMask(0.3, scale="rsqrt_density"),
}
every = pytest.mark.parametrize("kind", TEMPLATES)


def owned(kind: str, weight: Tensor) -> ScoreMask:
    """A mask of this weight whose scores are spread on both sides of its cut."""
    made = TEMPLATES[kind]().for_weight(weight)
    with torch.no_grad():
        made.own_scores().copy_(values(*weight.shape, seed=9))
    return made


def effective(made: ScoreMask, weight: Tensor, bits: Tensor) -> Tensor:
    weight = torch.where(bits, weight, -weight if made.off == "flip" else 0.0)
    return weight / bits.float().mean().sqrt() if made.scale else weight


@every
def test_a_template_makes_masks_of_their_own(kind: str) -> None:
    template, weight = TEMPLATES[kind](), values(37, 45)
    one, two = template.for_weight(weight), template.for_weight(values(5, 7))
    assert template.shape is None
    assert not list(template.parameters())
    assert not template.state_dict()
    assert one.shape == weight.shape
    assert two.shape == (5, 7)
    assert one.settings() == template.settings()
    ((name, scores),) = one.named_parameters()
    assert name == ("logits" if kind == "gumbel" else "scores")
    assert scores is one.own_scores()
    assert scores.dtype == torch.float32
    assert scores.requires_grad
    assert one.for_weight(weight) is one
    with pytest.raises(
        ValueError, match=r"Mask: expected a weight of shape \(37, 45\), got \(45, 37\)"
    ):
        one.for_weight(weight.T)
    with pytest.raises(
        ValueError, match="Mask: expected a weight on cpu like the mask, got one on meta"
    ):
        one.for_weight(weight.to("meta"))


@every
def test_a_template_says_what_to_do(kind: str) -> None:
    template = TEMPLATES[kind]()
    for use in (
        lambda: template.density,
        template.active,
        lambda: template.linear(values(2, 3), values(4, 3)),
    ):
        with pytest.raises(
            ValueError, match="expected the mask of a weight, got a template; make one"
        ):
            use()
    assert "template" in repr(template)


def test_first_scores() -> None:
    weight = values(37, 45)
    gumbel = GumbelMask().for_weight(weight)
    assert torch.equal(gumbel.logits, torch.full((37, 45), 2.0))
    assert float(gumbel.expected_density().detach()) == pytest.approx(
        torch.sigmoid(torch.tensor(2.0)).item()
    )
    assert torch.equal(ThresholdMask().for_weight(weight).scores, torch.ones(37, 45))
    magnitude = TopKMask(0.5, init="magnitude").for_weight(weight)
    assert torch.equal(magnitude.scores, weight.abs())
    kaiming = TopKMask(0.5).for_weight(weight).scores.detach()
    assert kaiming.abs().max() <= 45**-0.5
    # Uniform on +-c: the mean of n draws is normal with deviation c / sqrt(3 n).
    assert abs(kaiming.mean()) < 5 * 45**-0.5 / (3 * kaiming.numel()) ** 0.5
    assert kaiming.std() == pytest.approx((45**-0.5) / 3**0.5, rel=0.05)
    torch.manual_seed(3)
    first = TopKMask(0.5).for_weight(weight)
    torch.manual_seed(3)
    assert torch.equal(TopKMask(0.5).for_weight(weight).scores, first.scores)


def test_scores_are_float32_over_any_weight_and_never_the_weight_itself() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        weight = values(5, 7, dtype=dtype).abs()
        made = ThresholdMask(init="magnitude").for_weight(weight)
        assert made.scores.dtype == torch.float32
        assert made.scores.data_ptr() != weight.data_ptr()
    on_meta = TopKMask(0.5).for_weight(weight.to("meta"))
    assert on_meta.scores.device.type == "meta"


@every
def test_training_is_learned_linear(kind: str) -> None:
    weight, x, bias = values(37, 45), values(6, 45, seed=1), values(37, seed=2)
    made = owned(kind, weight)
    torch.manual_seed(5)
    y = made.linear(x, weight, bias)
    torch.manual_seed(5)
    want = ops.learned_linear(x, weight, made.own_scores(), bias=bias, **made.learned_options())
    assert_same_bits(y, want)
    y.square().sum().backward()
    assert made.own_scores().grad is not None
    assert made.own_scores().grad.abs().sum() > 0


@every
def test_evaluation_is_deterministic_and_teaches_nothing(kind: str) -> None:
    weight, x, bias = values(37, 45), values(5, 45, seed=1), values(37, seed=2)
    made = owned(kind, weight).eval()
    before = torch.get_rng_state()
    y = made.linear(x, weight, bias)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(y, made.linear(x, weight, bias))
    bits = made.active().to_bool()
    torch.testing.assert_close(y, F.linear(x, effective(made, weight, bits), bias))
    assert not y.requires_grad
    leaf = x.clone().requires_grad_()
    made.linear(leaf, weight, bias).sum().backward()
    assert leaf.grad is not None
    assert made.own_scores().grad is None


@every
def test_the_bits_of_evaluation(kind: str) -> None:
    made = owned(kind, values(37, 45))
    scores = made.own_scores().detach()
    want = {
        "gumbel": scores > 0,
        "threshold": scores > 0.01,
        "threshold-flip": scores > 0,
        "threshold-scale": scores > 0,
    }.get(kind, scores >= scores.flatten().sort(descending=True).values[round(0.3 * 37 * 45) - 1])
    assert made.active() == BitMask.from_bool(want)
    assert made.density == want.sum().item() / want.numel()


@pytest.mark.parametrize("kind", [k for k in TEMPLATES if k != "gumbel"])
def test_training_and_evaluation_agree_where_nothing_is_drawn(kind: str) -> None:
    weight, x = values(37, 45), values(6, 45, seed=1)
    made = owned(kind, weight)
    assert_same_bits(made.linear(x, weight), made.eval().linear(x, weight))


def test_gumbel_samples_share_the_rows() -> None:
    weight, x = values(37, 45), values(6, 45)
    made = GumbelMask(init=0.0, samples=3).for_weight(weight)
    torch.manual_seed(1)
    y = made.linear(x, weight)
    torch.manual_seed(1)
    bits = ops.unpack(ops.sample_mask(made.logits, samples=3), weight.shape)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(y[rows], F.linear(x[rows], weight * bits[i]))
    with pytest.raises(
        ValueError, match="samples: expected a number of masks that divides the 5 rows"
    ):
        made.linear(x[:5], weight)
    assert made.eval().linear(x[:5], weight).shape == (5, 37)


def test_expected_density_is_what_draws_have_and_has_a_gradient() -> None:
    made = GumbelMask().for_weight(values(100, 100))
    with torch.no_grad():
        made.logits.copy_(values(100, 100, seed=3))
    expected = made.expected_density()
    p = torch.sigmoid(made.logits.detach().double())
    drawn = ops.popcount(ops.sample_mask(made.logits, seed=1, samples=8)).sum().item() / 80_000
    assert abs(drawn - float(expected.detach())) < 5 * ((p * (1 - p)).mean().item() / 80_000) ** 0.5
    expected.backward()
    torch.testing.assert_close(made.logits.grad, (p * (1 - p) / 10_000).float())


def test_fixed_bits() -> None:
    weight, x = values(37, 45).requires_grad_(), values(6, 45)
    bits = mask(37, 45)
    active = BitMask.from_bool(bits)
    made = FixedMask(active)
    assert made.for_weight(weight) is made
    assert made.active() == active
    assert made.density == bits.sum().item() / bits.numel()
    assert dict(made.named_buffers()).keys() == {"bits"}
    assert not list(made.parameters())
    y = made.linear(x, weight)
    assert_same_bits(y, made.eval().linear(x, weight))
    assert_same_bits(y, ops.masked_linear(x, weight, active.bits))
    made.bits.zero_()
    assert active.count() == bits.sum(), "the mask has bits of its own"
    assert not made.linear(x, weight).any()
    with pytest.raises(
        ValueError, match=r"FixedMask: expected a weight of shape \(37, 45\), got \(45, 37\)"
    ):
        made.for_weight(weight.T)
    with pytest.raises(TypeError, match="active: expected a fastmask.BitMask, got Tensor"):
        FixedMask(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_scores_float32(cast: str) -> None:
    made = owned("threshold", values(37, 45))
    before = made.scores.detach().clone()
    made.scores.sum().backward()
    optimizer_view = made.scores
    network = getattr(nn.Sequential(nn.Linear(3, 2), made), cast)()
    assert network[0].weight.dtype != torch.float32
    assert made.scores is optimizer_view
    assert_same_bits(made.scores.detach(), before)
    assert made.scores.grad is not None
    assert made.scores.grad.dtype == torch.float32
    made.to("meta", torch.float16)
    assert (made.scores.device.type, made.scores.dtype) == ("meta", torch.float32)
    made.to_empty(device="cpu")
    assert (made.scores.device.type, made.scores.dtype) == ("cpu", torch.float32)


def test_casts_leave_bits_alone() -> None:
    made = FixedMask(BitMask.from_bool(mask(37, 45)))
    before = made.bits.clone()
    made.half().to(torch.float64)
    assert torch.equal(made.bits, before)
    assert made.to("meta").extra_repr() == "shape=(37, 45)"


def masks() -> list[Mask]:
    made: list[Mask] = [owned(kind, values(5, 7)) for kind in TEMPLATES]
    return [*made, FixedMask(BitMask.from_bool(mask(5, 7)))]


@pytest.mark.parametrize("made", masks(), ids=repr)
def test_copies_and_pickles(made: Mask) -> None:
    x, weight = values(6, 7), values(5, 7)
    made.linear(x, weight)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        assert repr(other) == repr(made)
        assert other.active() == made.active()
        torch.manual_seed(1)
        want = made.linear(x, weight)
        torch.manual_seed(1)
        assert_same_bits(other.linear(x, weight), want)
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert made.density > 0, "copies have tensors of their own"


def test_repr_tells_the_settings() -> None:
    assert repr(GumbelMask(samples=4)) == "GumbelMask(template, init=2.0, tau=1.0, samples=4)"
    made = ThresholdMask(off="flip").for_weight(values(5, 7))
    assert repr(made) == "ThresholdMask(shape=(5, 7), init=1.0, mu=0.0, off='flip', scale=None)"
    assert repr(TopKMask(0.25)).startswith("TopKMask(template, density=0.25")
    fixed = FixedMask(BitMask.ones((5, 7)))
    assert repr(fixed) == "FixedMask(shape=(5, 7), density=1.0)"


def test_what_they_refuse() -> None:
    def refuse(kind: type[Exception], match: str, make: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=match):
            make()

    for tau in (0.0, -1.0, NAN):
        refuse(
            ValueError, "tau: expected a finite number above 0", lambda tau=tau: GumbelMask(tau=tau)
        )
    refuse(ValueError, "samples: expected at least 1, got 0", lambda: GumbelMask(samples=0))
    refuse(ValueError, "init: expected a finite number, got nan", lambda: GumbelMask(init=NAN))
    refuse(TypeError, "init: expected a number", lambda: GumbelMask(init="kaiming"))  # type: ignore[arg-type]
    refuse(
        ValueError, "init: expected one of 'kaiming', 'magnitude'", lambda: ThresholdMask("normal")
    )  # type: ignore[arg-type]
    refuse(ValueError, "mu: expected a finite number, got nan", lambda: ThresholdMask(mu=NAN))
    refuse(ValueError, "density: expected a share", lambda: TopKMask(1.5))
    refuse(ValueError, "off: expected one of 'zero', 'flip'", lambda: TopKMask(0.5, "sign"))  # type: ignore[arg-type]
    refuse(ValueError, "scale: expected None with off='flip'",
           lambda: ThresholdMask(off="flip", scale="rsqrt_density"))  # fmt: skip
    refuse(
        TypeError,
        "weight: expected dtype float32",
        lambda: TopKMask(0.5).for_weight(torch.ones(2, 2).int()),
    )
    refuse(TypeError, "weight: expected a torch.Tensor", lambda: GumbelMask().for_weight([1.0]))  # type: ignore[arg-type]
