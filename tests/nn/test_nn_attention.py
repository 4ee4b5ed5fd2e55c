"""MaskedMultiheadAttention in the place of nn.MultiheadAttention: what it computes, and where it goes."""

from __future__ import annotations

import copy
import inspect
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
from fastmask import BitMask, FixedMask, GumbelMask, ThresholdMask, TopKMask, ops
from fastmask.masks import Mask
from fastmask.nn import MaskedMultiheadAttention
from fastmask.nn.attention import projections
from fastmask.testing import assert_same_bits, mask, values

E, HEADS, B, L, S = 8, 2, 4, 5, 6
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "added key and value": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "other widths": {"kdim": 5, "vdim": 7, "batch_first": True},
    "dropout": {"dropout": 0.5},
}
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights of heads": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": mask(B, S, density=0.3), "need_weights": False},
    "allowed": {"attn_mask": mask(L, S, density=0.3)},
    "added": {"attn_mask": values(L, S), "need_weights": False},
    "of each head": {"attn_mask": values(B * HEADS, L, S), "key_padding_mask": values(B, S)},
}
TEMPLATES: dict[str, Callable[[], Mask]] = {
    "gumbel": lambda: GumbelMask(init=0.5),
    "threshold": lambda: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.5, "flip"),
}
every = pytest.mark.parametrize("kind", TEMPLATES)
widths = pytest.mark.parametrize("name", ["plain", "other widths"])


def plain(name: str = "plain") -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, HEADS, **LAYERS[name])
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(values(*p.shape, seed=p.numel()))
    return layer


def made(kind: str, name: str = "plain") -> MaskedMultiheadAttention:
    return MaskedMultiheadAttention.from_attention(plain(name), TEMPLATES[kind]())


def inputs(layer: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((L, E), (S, layer.kdim), (S, layer.vdim))
    made = [values(B, *shape, seed=i) for i, shape in enumerate(shapes)]
    return tuple(x if layer.batch_first else x.transpose(0, 1).contiguous() for x in made)  # type: ignore[return-value]


def seeded(layer: nn.Module, *args: Any, seed: int = 4, **how: Any) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(seed)
    return layer(*args, **how)


def assert_same(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> None:
    assert_same_bits(a[0].detach(), b[0].detach())
    assert (a[1] is None) == (b[1] is None)
    if a[1] is not None and b[1] is not None:
        assert_same_bits(a[1].detach(), b[1].detach())


def ones(layer: nn.MultiheadAttention) -> dict[str, Mask]:
    """Fixed masks of ones, which leave the weights trainable."""
    return {
        name: FixedMask(BitMask.ones(getattr(owner, key).shape))
        for name, (owner, key) in projections(layer).items()
    }


def baked(layer: MaskedMultiheadAttention) -> nn.MultiheadAttention:
    """A plain layer whose weights are the masked ones of evaluation."""
    other = copy.deepcopy(layer)
    fastmask.bake_(other)
    return other


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_masks_of_ones_are_torchs_own_bits(name: str, call: str, mode: bool) -> None:
    layer = plain(name).train(mode)
    x, how = inputs(layer), CALLS[call]
    fixed = MaskedMultiheadAttention.from_attention(copy.deepcopy(layer), ones(layer))
    expected = seeded(layer, *x, **how)
    assert_same(seeded(fixed, *x, **how), expected)
    gradients = []
    for each in (layer, fixed):
        each.zero_grad()
        seeded(each, *x, **how)[0].square().sum().backward()
        gradients.append([p.grad for p in each.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_same_bits(a, b)
    if mode:  # Where the masked weight requires gradients through its scores.
        learned = MaskedMultiheadAttention.from_attention(layer, ThresholdMask(1.0))
        assert_same(seeded(learned, *x, **how), expected)


@pytest.mark.parametrize("first", [True, False])
def test_self_attention_in_evaluation_takes_the_same_path(first: bool) -> None:
    # Batch first, this is torch's fast path, which reads the weights in an operator of its own.
    layer = nn.MultiheadAttention(E, HEADS, batch_first=first).eval()
    x = values(L, L, E)
    with torch.no_grad():
        for how in ({}, {"need_weights": False}, {"attn_mask": torch.ones(L, L).triu(1).bool()}):
            expected = layer(x, x, x, **how)
            other = MaskedMultiheadAttention.from_attention(
                copy.deepcopy(layer), ThresholdMask(1.0)
            ).eval()
            assert_same(other(x, x, x, **how), expected)
    causal = {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True}
    assert_same(other(x[0], x[0], x[0], **causal), layer(x[0], x[0], x[0], **causal))


@every
@widths
def test_evaluation_is_the_baked_layer_and_leaves_the_scores_alone(kind: str, name: str) -> None:
    layer = made(kind, name).eval()
    x = inputs(layer)
    for own in layer.mask.values():
        for p in own.parameters():
            p.data = values(*p.shape)
        assert 0 < own.density < 1
    other = baked(layer)
    assert type(other) is nn.MultiheadAttention
    for p in other.parameters():  # Torch's bits depend on it.
        p.requires_grad_(p.dim() == 1)
    assert_same(layer(*x), other(*x))
    layer(*x)[0].sum().backward()
    assert all(p.grad is None for own in layer.mask.values() for p in own.parameters())


@widths
def test_every_projection_is_masked(name: str) -> None:
    layer = plain(name)
    x = inputs(layer)
    expected = layer(*x)[0]
    for hidden in ones(layer):
        masks = ones(layer)
        masks[hidden].bits.zero_()  # type: ignore[union-attr, operator]
        other = MaskedMultiheadAttention.from_attention(layer, masks)
        assert not torch.allclose(other(*x)[0], expected), hidden
    assert layer.out_proj.weight.requires_grad


@widths
def test_scores_learn_straight_through(name: str) -> None:
    layer = MaskedMultiheadAttention.from_attention(plain(name), ThresholdMask("kaiming"))
    x, reference = inputs(layer), baked(layer)
    for p in reference.parameters():
        p.requires_grad_()
    for each in (layer, reference):
        each(*x)[0].square().sum().backward()
    own = projections(layer)
    for (which, (owner, key)), (other, _) in zip(
        own.items(), projections(reference).values(), strict=True
    ):
        weight = getattr(owner, key)
        assert weight.grad is None and not weight.requires_grad
        # dL/dscore = dL/dW' * W, inactive ones too.
        assert_same_bits(layer.mask[which].scores.grad, getattr(other, key).grad * weight)
    assert_same_bits(layer.in_proj_bias.grad, reference.in_proj_bias.grad)


@widths
def test_it_is_converted_in_place_by_masks_of_each_weight(name: str) -> None:
    layer, calls = plain(name), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x, state = inputs(layer), {key: t.clone() for key, t in layer.state_dict().items()}
    expected, given = layer(*x), ones(layer)
    layer.in_proj_bias.requires_grad_(False)
    layer.out_proj.weight.requires_grad_(False)
    flags = [p.requires_grad for p in layer.parameters()]
    for masks in (given, TopKMask(0.5)):
        assert fastmask.mask_(layer, masks).converted == ("",)
        assert type(layer) is MaskedMultiheadAttention and list(layer.mask) == list(given)
        assert not torch.equal(layer(*x)[0], expected[0]) or masks is given
        assert all(layer.mask[key] is not own for key, own in given.items())
        fastmask.unmask_(layer)
        assert type(layer) is nn.MultiheadAttention
        assert [p.requires_grad for p in layer.parameters()] == flags
        for key, tensor in layer.state_dict().items():
            assert_same_bits(tensor, state[key])
    assert len(calls) == 3
    with pytest.raises(ValueError, match="for layer the model itself: expected masks named"):
        fastmask.mask_(layer, {"in": GumbelMask()})
    wrong: Any = {"in_proj": "mask"}
    with pytest.raises(TypeError, match="mask: expected a fastmask mask, got str"):
        fastmask.mask_(layer, wrong)


@pytest.mark.parametrize("name", ["plain", "batch first", "other widths"])
@pytest.mark.parametrize("call", ["weights", "padding", "added", "of each head"])
def test_samples_share_the_batch(name: str, call: str) -> None:
    base = plain(name)
    layer = MaskedMultiheadAttention.from_attention(base, GumbelMask(init=0.0, samples=2))
    x, how = inputs(layer), CALLS[call]
    out, attended = seeded(layer, *x, **how)
    torch.manual_seed(4)
    drawn = {
        which: ops.learned_weight(getattr(owner, key), layer.mask[which].logits, samples=2)
        for which, (owner, key) in projections(layer).items()
    }
    dim = 0 if layer.batch_first else 1
    for i in range(2):
        half = plain(name)
        for which, (owner, key) in projections(half).items():
            getattr(owner, key).data = drawn[which][i].detach()
        rows = slice(i * B // 2, (i + 1) * B // 2)
        part = {
            key: each.chunk(2)[i] if isinstance(each, Tensor) and len(each) != L else each
            for key, each in how.items()
        }
        want = half(*(t.narrow(dim, rows.start, B // 2) for t in x), **part)
        got = out.narrow(dim, rows.start, B // 2).contiguous()
        assert_same(
            (got, attended if attended is None else attended[rows]), (want[0].contiguous(), want[1])
        )
    out.square().sum().backward()
    assert all(own.logits.grad.any() for own in layer.mask.values())
    with pytest.raises(ValueError, match=r"query: expected a batch that the 2 samples"):
        layer(*(t.narrow(dim, 0, 3) for t in x))


def test_the_constructor_is_torchs() -> None:
    theirs, ours = (
        inspect.signature(c).parameters for c in (nn.MultiheadAttention, MaskedMultiheadAttention)
    )
    assert [(p.name, p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values() if p.name != "mask"
    ]
    torch.manual_seed(1)
    layer = MaskedMultiheadAttention(E, HEADS, mask=GumbelMask(), dtype=torch.bfloat16)
    torch.manual_seed(1)
    assert_same_bits(
        layer.in_proj_weight, nn.MultiheadAttention(E, HEADS, dtype=torch.bfloat16).in_proj_weight
    )
    assert layer.mask.in_proj.logits.dtype == torch.float32
    assert list(layer.mask) == ["in_proj", "out_proj"]
    assert list(made("gumbel", "other widths").mask) == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_from_attention_shares_the_parameters() -> None:
    for name in LAYERS:
        base = plain(name).eval()
        layer = MaskedMultiheadAttention.from_attention(base, ThresholdMask())
        for key, p in base.named_parameters():
            assert layer.get_parameter(key) is p
        assert (
            not layer.training and not layer.mask.in_proj.training if "in_proj" in layer.mask else 1
        )
        # What torch's own layer holds besides its parameters, so that none is forgotten.
        own = {key: v for key, v in vars(base).items() if key not in vars(nn.Module())}
        assert own and {key: getattr(layer, key) for key in own} == own


@every
@widths
def test_checkpoints_hold_all_masks_or_none(kind: str, name: str) -> None:
    layer, base = made(kind, name), plain(name)
    before = {which: own.active() for which, own in layer.mask.items()}
    layer.load_state_dict(base.state_dict(), strict=True)
    assert {which: own.active() for which, own in layer.mask.items()} == before
    base.load_state_dict(fastmask.plain_state_dict(layer), strict=True)
    state = layer.state_dict()
    assert [key for key in state if not key.startswith("mask.")] == list(base.state_dict())
    other = made(kind, name)
    other.load_state_dict(state, strict=True)
    assert {which: own.active() for which, own in other.mask.items()} == before
    for which in before:
        part = {key: t for key, t in state.items() if not key.startswith(f"mask.{which}.")}
        with pytest.raises(RuntimeError, match=rf'Missing key.*"0.mask.{which}\.\w+"'):
            nn.Sequential(layer).load_state_dict({f"0.{key}": t for key, t in part.items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.mask.load_state_dict({})


@every
def test_copies_casts_and_recomputing(kind: str) -> None:
    layer = made(kind)
    x = inputs(layer)
    expected = seeded(layer, *x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(seeded(other, *x), expected)
    query = x[0].clone().requires_grad_()
    gradients = []
    for run in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=False)):
        layer.zero_grad()
        seeded(run, query, *x[1:])[0].square().sum().backward()
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert_same_bits(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = seeded(layer, *x)[0]
    out.float().sum().backward()
    low = copy.deepcopy(layer).bfloat16()
    assert low(*(t.bfloat16() for t in x))[0].dtype == torch.bfloat16
    for each in (layer, low):
        for own in each.mask.values():
            assert all(p.dtype == torch.float32 for p in own.parameters())


@pytest.mark.parametrize(
    "kind, name", [("gumbel", "plain"), ("gumbel", "other widths"), ("topk", "plain")]
)
def test_compiled_whole_and_exported(kind: str, name: str) -> None:
    layer = made(kind, name)
    x = inputs(layer)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = seeded(run, *x, seed=seed)[0]
            y.square().sum().backward()
            results.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
        for eager, other in zip(*results, strict=True):
            assert_same_bits(other, eager)
    assert counter.frame_count == 1
    layer.eval()
    program = torch.export.export(layer, x).module()
    assert_same(program(*x), layer(*x))


def test_what_it_refuses() -> None:
    wrong: Any = "mask"
    with pytest.raises(TypeError, match="mask: expected a fastmask mask, got str"):
        MaskedMultiheadAttention(E, HEADS, mask=wrong)
    with pytest.raises(ValueError, match=r"masks named \['in_proj', 'out_proj'\], got \['in'\]"):
        MaskedMultiheadAttention(E, HEADS, mask={"in": GumbelMask()})
    fixed = FixedMask(BitMask.ones((E, E)))
    with pytest.raises(ValueError, match=r"expected a weight of shape \(8, 8\), got \(24, 8\)"):
        MaskedMultiheadAttention(E, HEADS, mask=fixed)
    with pytest.raises(ValueError, match=r"for layer the model itself \(in_proj\): FixedMask"):
        fastmask.mask_(plain(), fixed)
    with pytest.raises(TypeError, match="attention: expected a plain .* got MaskedMultihead"):
        MaskedMultiheadAttention.from_attention(made("topk"), GumbelMask())
    base = plain()
    prune.l1_unstructured(base.out_proj, "weight", 0.5)
    with pytest.raises(ValueError, match="attention: expected weight to be a parameter"):
        MaskedMultiheadAttention.from_attention(base, GumbelMask())
    both = {"in_proj": GumbelMask(samples=2), "out_proj": GumbelMask(samples=4)}
    layer = MaskedMultiheadAttention.from_attention(plain(), both)
    with pytest.raises(ValueError, match="one number of samples in all masks"):
        layer(*inputs(layer))
