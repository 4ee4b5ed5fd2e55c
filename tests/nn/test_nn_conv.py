"""MaskedConv2d in the place of nn.Conv2d: what it computes, and where it goes in a program."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastmask
from fastmask import (
    BitMask,
    FixedMask,
    GumbelMask,
    MaskedConv2d,
    ThresholdMask,
    TopKMask,
    ops,
    plain_state_dict,
)
from fastmask.masks import Mask
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

LAST = torch.channels_last
SHAPE = (8, 3, 3, 2)
HOW: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
MASKS: dict[str, Callable[[], Mask]] = {
    "gumbel": lambda: GumbelMask(init=0.0, samples=2),
    "threshold": lambda: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.5, "flip"),
    "fixed": lambda: FixedMask(BitMask.from_bool(mask(*SHAPE))),
}
every = pytest.mark.parametrize("kind", MASKS)
# Constructor options of layers that occur, over 6 channels in.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1, "stride": 2, "bias": False},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": (4, 3), "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "groups": 2},
    "replicate": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"},
    "valid reflect": {"kernel_size": 3, "padding": "valid", "padding_mode": "reflect"},
    "depthwise": {"kernel_size": 5, "groups": 6, "padding": 2, "dilation": (1, 2)},
}


def made(kind: str, **options: Any) -> MaskedConv2d:
    torch.manual_seed(0)
    return MaskedConv2d(6, 8, (3, 2), mask=MASKS[kind](), **HOW, **options)


def images(batch: int = 4) -> Tensor:
    return values(batch, 6, 9, 8)


def seeded(layer: nn.Module, x: Tensor, seed: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return layer(x)


def test_the_constructor_is_that_of_conv2d() -> None:
    plain, ours = (inspect.signature(c).parameters for c in (nn.Conv2d, MaskedConv2d))
    assert [(p.name, p.default) for p in plain.values()] == [
        (p.name, p.default) for p in ours.values() if p.name != "mask"
    ]
    template = GumbelMask()
    layer = MaskedConv2d(6, 8, 3, 2, 1, 1, 2, False, "zeros", "cpu", torch.bfloat16, mask=template)
    assert layer.bias is None
    assert layer.weight.dtype == torch.bfloat16
    assert layer.mask.logits.dtype == torch.float32
    assert repr(layer).startswith(
        "MaskedConv2d(\n  6, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False"
    )


@every
def test_it_starts_as_conv2d_starts(kind: str) -> None:
    layer = made(kind)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, (3, 2), **HOW)
    assert isinstance(layer, nn.Conv2d)
    assert_same_bits(layer.weight.detach(), plain.weight.detach())
    assert_same_bits(layer.bias.detach(), plain.bias.detach())
    keys = [f"mask.{key}" for key in layer.mask.state_dict()]
    assert list(layer.state_dict()) == ["weight", "bias", *keys]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_all_ones_is_conv2d_and_half_is_the_selected_weight(name: str, last: bool) -> None:
    options = LAYERS[name]
    plain = nn.Conv2d(6, 12, **options)
    x = values(3, 6, 9, 11)
    if last:
        plain, x = plain.to(memory_format=LAST), x.to(memory_format=LAST)
    learned = MaskedConv2d.from_conv(copy.deepcopy(plain), ThresholdMask(init=1.0))
    fixed = FixedMask(BitMask.ones(plain.weight.shape))
    fresh = MaskedConv2d(6, 12, mask=fixed, **options)
    fresh.load_state_dict(plain.state_dict())
    # load_state_dict copies values into the weight's own memory format.
    fresh = fresh.to(memory_format=LAST) if last else fresh
    still = copy.deepcopy(learned).eval()
    for layer in (learned, still, fresh, MaskedConv2d.from_conv(plain, fixed)):
        y = layer(x)
        assert_same_bits(y, plain(x))
        assert y.stride() == plain(x).stride()
        assert_same_bits(layer(x[0]), plain(x[0]))
        assert repr(layer).split("\n")[1].strip() == repr(plain).removeprefix("Conv2d(")[:-1]
    bits = mask(*plain.weight.shape)
    half = MaskedConv2d.from_conv(plain, FixedMask(BitMask.from_bool(bits)))
    selected = copy.deepcopy(plain)
    with torch.no_grad():
        selected.weight.masked_fill_(~bits, 0.0)
    assert_same_bits(half(x), selected(x))


@every
def test_what_learns(kind: str) -> None:
    layer = made(kind)
    layer(images()).square().sum().backward()
    learned = {name for name, p in layer.named_parameters() if p.grad is not None}
    scores = {"gumbel": "mask.logits", "fixed": "weight"}.get(kind, "mask.scores")
    assert learned == {scores, "bias"}
    assert layer.weight.requires_grad == (kind == "fixed")
    if kind == "fixed":
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad != 0, layer.mask.active().to_bool())


@every
def test_from_conv_shares_the_parameters(kind: str) -> None:
    plain = nn.Conv2d(6, 8, (3, 2), **HOW).eval()
    layer = MaskedConv2d.from_conv(plain, MASKS[kind]())
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert not layer.mask.training
    # What torch's own layer holds besides its parameters, so that none is forgotten.
    own = {key: v for key, v in vars(plain).items() if key not in vars(nn.Module())}
    assert own
    assert {key: getattr(layer, key) for key in own} == own
    assert MaskedConv2d.from_conv(nn.Conv2d(6, 4, 3, bias=False), GumbelMask()).bias is None


@every
def test_copies_pickles_and_saves_before_and_after_a_forward(kind: str) -> None:
    layer, x = made(kind, padding_mode="reflect"), images()
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False),
        ):  # fmt: skip
            assert_same_bits(seeded(other, x), seeded(layer, x))
            assert other.weight.requires_grad == layer.weight.requires_grad
            assert all(
                a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True)
            )
        layer(x).sum().backward()


@every
def test_checkpoints_both_ways(kind: str) -> None:
    layer, plain = made(kind), nn.Conv2d(6, 8, (3, 2), **HOW)
    before = layer.mask.active()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert layer.mask.active() == before
    assert_same_bits(layer.weight.detach(), plain.weight.detach())
    plain.load_state_dict(plain_state_dict(layer), strict=True)
    assert list(plain_state_dict(nn.Sequential(layer))) == ["0.weight", "0.bias"]
    other = made(kind)
    for tensor in other.mask.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert other.mask.active() == before
    state = layer.state_dict()
    key = next(key for key in state if key.startswith("mask."))
    state["mask.stranger"] = state.pop(key)
    with pytest.raises(RuntimeError, match=rf'(?s)Missing key.*"{key}".*Unexpected.*stranger'):
        layer.load_state_dict(state)


@every
def test_casts_and_autocast_leave_the_scores_alone(kind: str) -> None:
    layer, x = made(kind), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = seeded(layer, x)
    low = copy.deepcopy(layer).bfloat16()
    assert {p.dtype for p in low.mask.parameters()} <= {torch.float32}
    assert_same_bits(y, seeded(low, x.bfloat16()))
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    assert layer.half()(x.half()).dtype == torch.float16


@every
def test_channels_last_draws_the_same_bits(kind: str) -> None:
    layer, x = made(kind), images()
    last = copy.deepcopy(layer).to(memory_format=LAST)
    assert last.mask.active() == layer.mask.active()
    y = seeded(last, x.to(memory_format=LAST))
    assert y.is_contiguous(memory_format=LAST)
    exact = seeded(copy.deepcopy(layer).double(), x.double())
    assert_within_budget(y.detach(), seeded(layer, x).detach(), exact.detach())


@every
def test_functional_call_and_averages(kind: str) -> None:
    layer, x = made(kind), images()
    other = {name: t.clone() for name, t in layer.state_dict().items()}
    other["weight"] = values(*SHAPE, seed=7)
    name = next(name for name in other if name.startswith("mask."))
    other[name] = other[name].flip(0) if kind != "fixed" else ops.pack(mask(*SHAPE, seed=7))
    torch.manual_seed(4)
    y = torch.func.functional_call(layer, other, (x,))
    stranger = copy.deepcopy(layer)
    stranger.load_state_dict(other)
    assert_same_bits(y, seeded(stranger, x))
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    assert_same_bits(seeded(average, x), seeded(layer, x))


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_noise(kind: str, reentrant: bool) -> None:
    last = MaskedConv2d(8, 4, 1, mask=GumbelMask(samples=2))
    layer = nn.Sequential(made(kind), nn.Tanh(), last)
    x = images().requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(8)
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in parameters)])
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain)


@every
def test_compiled_whole_in_both_modes(kind: str) -> None:
    layer, x = made(kind, padding_mode="circular"), images()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for mode in (True, False):
        layer.train(mode)
        for seed in (1, 2, 3):
            if kind == "fixed":
                layer.mask.bits.copy_(ops.pack(mask(*SHAPE, seed=seed)))
            gradients = []
            for run in (layer, compiled):
                layer.zero_grad()
                y = seeded(run, x, seed)
                y.square().sum().backward()
                gradients.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
            for eager, other in zip(*gradients, strict=True):
                assert_same_bits(other, eager)
    assert counter.frame_count == (1 if kind == "fixed" else 2), "one for each mode that differs"


@every
def test_export_computes_the_same_and_changes_nothing(kind: str) -> None:
    layer, x = made(kind).eval(), images()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    exported = torch.export.export(layer, (x,)).module()
    assert_same_bits(exported(x), layer(x))
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'mask'"):
        MaskedConv2d(4, 3, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="mask: expected a fastmask mask, got BitMask"):
        MaskedConv2d(4, 3, 1, mask=BitMask.ones((3, 4, 1, 1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a weight of shape \(3, 4, 1, 1\), got \(3, 4,"):
        MaskedConv2d(4, 3, 3, mask=FixedMask(BitMask.ones((3, 4, 1, 1))))
    with pytest.raises(TypeError, match="conv: expected a plain torch.nn.Conv2d .* got Linear"):
        MaskedConv2d.from_conv(nn.Linear(4, 3), GumbelMask())  # type: ignore[arg-type]
    for other in (nn.ConvTranspose2d(4, 3, 1), nn.Conv1d(4, 3, 1), nn.LazyConv2d(3, 1)):
        with pytest.raises(TypeError, match=f"conv: expected a .* got {type(other).__name__}"):
            MaskedConv2d.from_conv(other, GumbelMask())  # type: ignore[arg-type]
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 1))
    with pytest.raises(TypeError, match="got ParametrizedConv2d"):
        MaskedConv2d.from_conv(normed, GumbelMask())
    pruned = prune.random_unstructured(nn.Conv2d(4, 3, 1), "weight", 0.5)
    with pytest.raises(ValueError, match="conv: expected weight to be a parameter, found it"):
        MaskedConv2d.from_conv(pruned, GumbelMask())
    with pytest.raises(ValueError, match="number of masks that divides the 3 images of x"):
        made("gumbel")(images(3))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 6, H, W\) or \(6, H, W\)"):
        made("gumbel")(values(4, 5, 9, 8))


def test_public_names() -> None:
    assert fastmask.MaskedConv2d is fastmask.nn.MaskedConv2d
    assert "MaskedConv2d" in fastmask.__all__
