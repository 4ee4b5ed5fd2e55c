"""MaskedLinear in the place of nn.Linear: what it computes, and where it goes in a program."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastmask
from fastmask import BitMask, FixedMask, GumbelMask, MaskedLinear, ThresholdMask, TopKMask, ops
from fastmask.masks import Mask
from fastmask.testing import assert_same_bits, mask, values

MASKS: dict[str, Callable[[], Mask]] = {
    "gumbel": lambda: GumbelMask(init=0.0, samples=2),
    "threshold": lambda: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.5, "flip"),
    "fixed": lambda: FixedMask(BitMask.from_bool(mask(37, 45))),
}
every = pytest.mark.parametrize("kind", MASKS)


def made(kind: str, **options: Any) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(45, 37, mask=MASKS[kind](), **options)


def seeded(layer: nn.Module, x: Tensor, seed: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return layer(x)


@every
def test_it_starts_as_linear_starts(kind: str) -> None:
    layer = made(kind)
    torch.manual_seed(0)
    plain = nn.Linear(45, 37)
    assert isinstance(layer, nn.Linear)
    assert_same_bits(layer.weight.detach(), plain.weight.detach())
    assert_same_bits(layer.bias.detach(), plain.bias.detach())
    assert list(layer.state_dict()) == [
        "weight",
        "bias",
        *(f"mask.{k}" for k in layer.mask.state_dict()),
    ]
    assert MaskedLinear(45, 37, False, mask=MASKS[kind]()).bias is None
    low = MaskedLinear(45, 37, True, "cpu", torch.bfloat16, mask=MASKS[kind]())
    assert low.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in low.mask.parameters())


@every
def test_forward_is_that_of_its_mask(kind: str) -> None:
    layer, x = made(kind), values(4, 3, 45)
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(4)
        want = layer.mask.linear(x, layer.weight, layer.bias)
        assert want.shape == (4, 3, 37)
        assert_same_bits(seeded(layer, x), want)


@every
def test_what_learns(kind: str) -> None:
    layer, x = made(kind), values(6, 45)
    layer(x).square().sum().backward()
    learned = {name for name, p in layer.named_parameters() if p.grad is not None}
    scores = {"gumbel": "mask.logits", "threshold": "mask.scores", "topk": "mask.scores"}.get(
        kind, "weight"
    )
    assert learned == {scores, "bias"}
    assert layer.weight.requires_grad == (kind == "fixed")
    layer.weight.requires_grad_()
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None, "the weight on request"


def test_fixed_mask_gives_inactive_weights_no_gradient() -> None:
    layer = made("fixed")
    layer(values(6, 45)).square().sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad != 0, layer.mask.active().to_bool())


@every
def test_from_linear_shares_the_parameters(kind: str) -> None:
    plain = nn.Linear(45, 37).eval()
    layer = MaskedLinear.from_linear(plain, MASKS[kind]())
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert not layer.mask.training
    assert (layer.in_features, layer.out_features) == (45, 37)
    assert repr(layer).startswith(
        "MaskedLinear(\n  in_features=45, out_features=37, bias=True\n  (mask): "
    )
    assert MaskedLinear.from_linear(nn.Linear(45, 37, bias=False), MASKS[kind]()).bias is None


def test_a_template_serves_many_layers_and_a_mask_one_shape() -> None:
    template = GumbelMask()
    one, two = MaskedLinear(4, 3, mask=template), MaskedLinear(4, 3, mask=template)
    assert one.mask is not two.mask
    assert one.mask.logits is not two.mask.logits
    assert template.shape is None
    shared = MaskedLinear(4, 3, mask=one.mask)
    assert shared.mask is one.mask
    with pytest.raises(
        ValueError, match=r"GumbelMask: expected a weight of shape \(3, 4\), got \(3, 5\)"
    ):
        MaskedLinear(5, 3, mask=one.mask)


@every
def test_copies_pickles_and_saves_before_and_after_a_forward(kind: str) -> None:
    layer, x = made(kind), values(6, 45)
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


def test_averaged_models() -> None:
    layer = made("gumbel")
    average = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        layer.mask.logits.add_(1.0)
    average.update_parameters(layer)
    average.update_parameters(layer)
    assert torch.equal(average.module.mask.logits, torch.ones(37, 45))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_move_the_weight_and_not_the_scores(kind: str, dtype: torch.dtype) -> None:
    layer = made(kind).to(dtype)
    assert {p.dtype for p in layer.mask.parameters()} <= {torch.float32}
    assert layer.weight.dtype == dtype
    assert layer(values(6, 45, dtype=dtype)).dtype == dtype
    layer.float()
    assert layer(values(6, 45)).dtype == torch.float32


@every
def test_autocast(kind: str) -> None:
    layer, x = made(kind), values(6, 45)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = seeded(layer, x)
    low = copy.deepcopy(layer).bfloat16()
    assert_same_bits(y, seeded(low, x.bfloat16()))
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_noise(kind: str, reentrant: bool) -> None:
    layer = nn.Sequential(made(kind), nn.Tanh(), MaskedLinear(37, 8, mask=GumbelMask(samples=3)))
    x = values(6, 45).requires_grad_()
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
def test_functional_call_takes_other_tensors(kind: str) -> None:
    layer, x = made(kind), values(6, 45)
    other = {name: t.clone() for name, t in layer.state_dict().items()}
    other["weight"] = values(37, 45, seed=7)
    name = next(name for name in other if name.startswith("mask."))
    other[name] = other[name].flip(0) if kind != "fixed" else ops.pack(mask(37, 45, seed=7))
    torch.manual_seed(4)
    y = torch.func.functional_call(layer, other, (x,))
    stranger = copy.deepcopy(layer)
    stranger.load_state_dict(other)
    assert_same_bits(y, seeded(stranger, x))


@every
def test_compiled_whole_in_both_modes(kind: str) -> None:
    layer, x = made(kind), values(6, 45)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for mode in (True, False):
        layer.train(mode)
        for seed in (1, 2, 3):
            gradients = []
            for run in (layer, compiled):
                layer.zero_grad()
                y = seeded(run, x, seed)
                y.square().sum().backward()
                gradients.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
            for eager, other in zip(*gradients, strict=True):
                assert_same_bits(other, eager)
    graphs = 1 if kind == "fixed" else 2  # one for training, one for evaluation
    assert counter.frame_count == graphs


@every
def test_export_computes_the_same_and_changes_nothing(kind: str) -> None:
    layer, x = made(kind).eval(), values(6, 45)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    exported = torch.export.export(layer, (x,)).module()
    assert_same_bits(exported(x), layer(x))
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_switching_fixed_bits_compiles_nothing_new() -> None:
    layer, x = made("fixed"), values(6, 45)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(4):
        active = mask(37, 45, seed=seed)
        layer.mask.bits.copy_(ops.pack(active))
        want = F.linear(x, torch.where(active, layer.weight, 0), layer.bias)
        torch.testing.assert_close(compiled(x), want)
    assert counter.frame_count == 1


def test_a_mask_learns_what_the_task_needs() -> None:
    # Labels depend on four of the eight inputs: those weights stay, the harmful others go.
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = x[:, :4].sum(1, keepdim=True)
    for template in (GumbelMask(init=0.0, samples=4), ThresholdMask(init=0.1)):
        layer = MaskedLinear(8, 1, bias=False, mask=template)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(layer(x), y).backward()
            optimizer.step()
        assert layer.mask.active().to_bool().tolist() == [[True] * 4 + [False] * 4]
        # Three additions in one order and in another, each within half an eps of what it adds.
        bound = 3 * torch.finfo(x.dtype).eps * x[:, :4].abs().sum(1, keepdim=True)
        assert ((layer.eval()(x) - y).abs() <= bound).all()
        assert_same_bits(layer.weight.detach(), before)


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'mask'"):
        MaskedLinear(4, 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="mask: expected a fastmask mask, got BitMask"):
        MaskedLinear(4, 3, mask=BitMask.ones((3, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FixedMask: expected a weight of shape"):
        MaskedLinear(4, 3, mask=FixedMask(BitMask.ones((4, 3))))
    with pytest.raises(ValueError, match="FixedMask: expected a weight on cpu like the mask"):
        MaskedLinear(4, 3, device="meta", mask=FixedMask(BitMask.ones((3, 4))))
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(TypeError, match="expected a plain torch.nn.Linear .* got NonDynamically"):
        MaskedLinear.from_linear(attention.out_proj, GumbelMask())
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(TypeError, match="got ParametrizedLinear"):
        MaskedLinear.from_linear(normed, GumbelMask())
    with pytest.raises(TypeError, match="got LazyLinear"):
        MaskedLinear.from_linear(nn.LazyLinear(3), GumbelMask())
    pruned = prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)
    with pytest.raises(ValueError, match="expected weight to be a parameter, found it computed"):
        MaskedLinear.from_linear(pruned, GumbelMask())
    with pytest.raises(
        ValueError, match="samples: expected a number of masks that divides the 3 rows"
    ):
        MaskedLinear(4, 3, mask=GumbelMask(samples=2))(values(3, 4))
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., 4\)"):
        MaskedLinear(4, 3, mask=GumbelMask())(values(3, 5))


def test_public_names() -> None:
    for name in ("MaskedLinear", "plain_state_dict"):
        assert getattr(fastmask, name) is getattr(fastmask.nn, name)
    for name in ("FixedMask", "GumbelMask", "ThresholdMask", "TopKMask"):
        assert getattr(fastmask, name) is getattr(fastmask.masks, name)
