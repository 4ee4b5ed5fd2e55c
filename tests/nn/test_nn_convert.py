"""mask_, unmask_ and bake_: what becomes of a network's layers, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.nn.utils import parametrizations, prune, weight_norm

import fastmask
from fastmask import (
    BitMask,
    FixedMask,
    GumbelMask,
    MaskedConv2d,
    MaskedLinear,
    ThresholdMask,
    TopKMask,
)
from fastmask.masks import Mask
from fastmask.nn.support import MASKED, READS_WEIGHTS
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

TEMPLATES: dict[str, Callable[[], Mask]] = {
    "gumbel": lambda: GumbelMask(init=0.5),
    "threshold": lambda: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.5, "flip"),
    "threshold alone": lambda: ThresholdMask("kaiming"),
}
every = pytest.mark.parametrize("kind", TEMPLATES)


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20, **options),
        nn.ReLU(),
        nn.LayerNorm(20, **options),
        nn.Sequential(nn.Linear(20, 20, bias=False, **options), nn.ReLU()),
        nn.Linear(20, 5, **options),
    )


def masked(model: nn.Module, template: Mask) -> nn.Module:
    """Convert, and spread the logits: equal ones, as they start, hide no weight in evaluation."""
    fastmask.mask_(model, template)
    for module in model.modules():
        if isinstance(module, GumbelMask):
            module.logits.data = values(*module.logits.shape)
            assert 0 < module.density < 1
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert_same_bits(a[key], b[key])


def untouched(model: nn.Module) -> Callable[[], None]:
    """A check that the model is what it is now: types, parameters, gradients, flags, values."""
    seen = [(name, m, type(m), dict(m.__dict__)) for name, m in model.named_modules()]
    params = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def check() -> None:
        now = [(name, m, type(m), dict(m.__dict__)) for name, m in model.named_modules()]
        assert [(n, id(m), t) for n, m, t, _ in now] == [(n, id(m), t) for n, m, t, _ in seen]
        for (_, _, _, a), (_, _, _, b) in zip(now, seen, strict=True):
            assert a.keys() == b.keys()
            assert a.get("activation_relu_or_gelu") == b.get("activation_relu_or_gelu")
            assert a.get("use_nested_tensor") == b.get("use_nested_tensor")
        after = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
        assert [(n, id(p), r) for n, p, r in after] == [(n, id(p), r) for n, p, r in params]
        assert_same_state(model.state_dict(), state)

    return check


@every
def test_each_layer_gets_a_mask_of_its_own_and_stays_the_object_it_was(kind: str) -> None:
    model, template = net(), TEMPLATES[kind]()
    layers, params = linears(model), dict(model.named_parameters())
    record = fastmask.mask_(model, template)
    assert record.converted == ("0", "3.0", "4") and not record.skipped
    assert linears(model) == layers
    for layer in layers:
        assert type(layer) is MaskedLinear and layer.mask is not template
        assert layer.mask.shape == layer.weight.shape and not layer.weight.requires_grad
        assert layer.bias is None or layer.bias.requires_grad
    assert len({layer.mask for layer in layers}) == 3
    now = dict(model.named_parameters())
    assert all(now[name] is param for name, param in params.items())
    assert template.shape is None
    assert "3 converted" in repr(record) and "3.0" in repr(record)


@every
def test_the_product_is_the_same_masked_or_baked_and_as_written(kind: str) -> None:
    x, model = values(7, 12), masked(net(), TEMPLATES[kind]())
    by_hand = net().eval()
    for layer, plain in zip(linears(model), linears(by_hand), strict=True):
        ones = layer.mask.active().to_bool()
        off = -plain.weight if getattr(layer.mask, "off", "zero") == "flip" else torch.zeros(())
        product = torch.where(ones, plain.weight.detach(), off.detach())
        if getattr(layer.mask, "scale", None):
            product = product * torch.sqrt(ones.numel() / ones.sum().float())
        plain.weight.data = product
    expected, exact = by_hand(x).detach(), copy.deepcopy(by_hand).double()(x.double()).detach()
    # A back end that reads bits may sum in an order of its own; what is baked has torch's.
    assert_within_budget(model.eval()(x).detach(), expected, exact)
    params = dict(net().named_parameters()).keys()
    weights = [layer.weight for layer in linears(model)]
    assert fastmask.bake_(model) == ("0", "3.0", "4")
    assert dict(model.named_parameters()).keys() == params
    assert [layer.weight for layer in linears(model)] == weights
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in linears(model))
    assert_same_bits(model(x).detach(), expected)
    net().load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_baking_rounds_as_evaluation_does(dtype: torch.dtype) -> None:
    model = net(dtype=dtype).eval().requires_grad_(False)
    fastmask.mask_(model, ThresholdMask("kaiming", scale="rsqrt_density"))
    layer, x = copy.deepcopy(model[0]), values(7, 12).to(dtype)
    fastmask.bake_(model)
    assert_same_bits(model[0].weight, layer.mask.effective(layer.weight)[0])
    exact = layer.mask.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_within_budget(layer(x), model[0](x), exact)  # an engine may scale sums, not weights


@every
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_convolutions_are_converted_baked_and_undone_too(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode=mode),
        nn.ReLU(),
        nn.Conv2d(6, 6, (1, 3), padding="same", groups=6, bias=False),
    ).eval()
    x = values(2, 4, 9, 8)
    plain = model(x).detach()
    check = untouched(model)
    masked(model, TEMPLATES[kind]())
    assert all(type(model[i]) is MaskedConv2d for i in (0, 2))
    assert not torch.equal(model(x), plain)
    assert fastmask.unmask_(model) == ("0", "2")
    check()
    assert_same_bits(model(x).detach(), plain)
    masked(model, TEMPLATES[kind]())
    expected = model(x).detach()
    fastmask.bake_(model)
    assert type(model[0]) is nn.Conv2d and model[0].weight.requires_grad
    assert_same_bits(model(x).detach(), expected)


def test_baking_removes_what_is_masked_out_even_nan_and_reads_evaluation_in_training() -> None:
    layer = nn.Linear(45, 37)
    active = mask(37, 45)
    with torch.no_grad():
        layer.weight[~active] = torch.nan
    fastmask.mask_(layer, FixedMask(BitMask.from_bool(active)))
    assert layer.training and layer.weight.requires_grad
    fastmask.bake_(layer)
    assert type(layer) is nn.Linear and not hasattr(layer, "mask")
    assert_same_bits(layer.weight[~active], torch.zeros(int((~active).sum())))
    assert layer.weight[active].isfinite().all()


@every
def test_unmask_undoes_everything(kind: str) -> None:
    model, x, calls = net(), values(7, 12), []
    model[4].weight.requires_grad_(False)
    model[3].eval()
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    handle = model[3][0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    expected = model(x).detach()
    check = untouched(model)
    fastmask.mask_(model, TEMPLATES[kind]())
    assert not model[3][0].mask.training and model[0].mask.training
    calls.clear()
    model(x).sum().backward()
    assert sorted(calls) == ["forward", "pre"]
    assert fastmask.unmask_(model) == ("0", "3.0", "4")
    check()
    assert_same_bits(model(x).detach(), expected)
    handle.remove()
    calls.clear()
    model(x)
    assert calls == ["forward"]


def test_it_is_undone_in_copies_and_after_a_cast() -> None:
    model, x = net(), values(7, 12)
    expected = model.double()(x.double()).detach()
    model.float()
    fastmask.mask_(model, TopKMask(0.5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        fastmask.unmask_(other.double())
        assert all(p.requires_grad and p.dtype == torch.float64 for p in other.parameters())
        assert_same_bits(other(x.double()).detach(), expected)


def test_a_layer_made_as_a_masked_one_becomes_plain() -> None:
    layer = MaskedLinear(5, 3, mask=GumbelMask())
    assert fastmask.unmask_(layer) == ("",)
    assert type(layer) is nn.Linear and not layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_filter_chooses_by_name_and_type() -> None:
    model, asked = net(), []

    def last(name: str, module: nn.Module) -> bool:
        asked.append((name, module))
        return name == "4"

    assert fastmask.mask_(model, GumbelMask(), last).converted == ("4",)
    assert [name for name, _ in asked] == ["0", "3.0", "4"]
    assert type(model[0]) is nn.Linear and type(model[4]) is MaskedLinear
    rest = fastmask.mask_(model, TopKMask(0.5), lambda _, m: not isinstance(m, MaskedLinear))
    assert rest.converted == ("0", "3.0") and type(model[4].mask) is GumbelMask


def test_a_mask_with_a_shape_is_copied_for_each_layer_that_has_it() -> None:
    fixed = FixedMask(BitMask.from_bool(mask(6, 6)))
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    fastmask.mask_(model, fixed)
    assert model[0].mask is not model[1].mask and model[0].mask is not fixed
    model[0].mask.bits.zero_()
    assert model[1].mask.density == fixed.density > 0
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    check = untouched(model)
    with pytest.raises(ValueError, match=r"layer 1: .*\(6, 6\)"):
        fastmask.mask_(model, fixed)
    check()


def test_a_module_under_two_names_is_converted_once() -> None:
    inner = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner)})
    assert fastmask.mask_(model, GumbelMask()).converted == ("a",)
    assert model["a"] is model["b"][0] and type(model["a"]) is MaskedLinear
    fastmask.unmask_(model)
    assert fastmask.mask_(model, GumbelMask(), lambda name, _: name == "b.0").converted == ("b.0",)


def test_tied_weights_stay_tied_and_are_not_baked() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "other": nn.Linear(4, 9)}
    )
    model["head"].weight = model["embed"].weight
    model["other"].weight = model["embed"].weight
    fastmask.mask_(model, TopKMask(0.5), lambda name, _: name != "embed")
    shared = model["embed"].weight
    assert model["head"].weight is shared is model["other"].weight and not shared.requires_grad
    assert model["head"].mask is not model["other"].mask
    before = shared.detach().clone()
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight and other\.weight"):
        fastmask.bake_(model)
    assert_same_bits(shared.detach(), before)
    assert type(model["head"]) is MaskedLinear
    fastmask.unmask_(model)
    assert model["head"].weight is shared and shared.requires_grad


class Derived(nn.Linear):
    pass


class DerivedAttention(nn.MultiheadAttention):
    pass


def attention_with_pruned_output() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    return attention


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def sharded() -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return distribute_module(nn.Linear(4, 4), init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def of_another_tensor() -> nn.Module:
    class Packed(nn.Parameter):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = Packed(layer.weight.detach())
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d is not supported"),
    "conv1d": (lambda: nn.Conv1d(4, 4, 1), "Conv1d is not supported"),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 4)), "weight_norm"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
    "pruned": (pruned, "prune"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 1), "lazy"),
    "lazy": (lambda: nn.LazyLinear(4), "lazy"),
    "quantized": (lambda: dynamic.Linear(4, 4), "quantized"),
    "sharded": (sharded, "DTensor"),
    "tensor subclass": (of_another_tensor, "Packed"),
    "derived": (lambda: Derived(4, 4), "test_nn_convert.Derived, derived from Linear"),
    "replaced forward": (replaced, "forward is replaced"),
    "attention": (lambda: DerivedAttention(4, 2), "DerivedAttention, derived from Multihead"),
    "half an attention": (attention_with_pruned_output, "prune"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:.*torch.ao.*", "ignore:.*[Ll]azy.*")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_take_a_mask_is_refused_by_name_and_told_by_default(kind: str) -> None:
    make, words = REFUSED[kind]
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make()})
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"bad cannot be masked: .*{words}.*nothing was changed"):
        fastmask.mask_(model, GumbelMask(), lambda name, _: name in ("good", "bad"))
    assert [type(module) for module in model.modules()] == kinds
    assert model["good"].weight.requires_grad
    record = fastmask.mask_(model, GumbelMask())
    assert record.converted == ("good",) and words in record.skipped["bad"]
    assert "- bad: " in repr(record)
    fastmask.unmask_(model)
    with pytest.raises(ValueError, match=r"supported layer \(Linear.*bad: "):
        fastmask.mask_(nn.ModuleDict({"bad": model["bad"]}), GumbelMask())


def test_nothing_to_do_and_double_conversion_are_errors() -> None:
    model = net()
    with pytest.raises(ValueError, match="chose none of the 3"):
        fastmask.mask_(model, GumbelMask(), lambda *_: False)
    with pytest.raises(ValueError, match="supported layer"):
        fastmask.mask_(nn.ReLU(), GumbelMask())
    for undo in (fastmask.unmask_, fastmask.bake_):
        with pytest.raises(ValueError, match="masked layers, found none"):
            undo(model)
    fastmask.mask_(model, GumbelMask(), lambda name, _: name == "4")
    check = untouched(model)
    with pytest.raises(ValueError, match="4 cannot be masked: it is masked already"):
        fastmask.mask_(model, GumbelMask())
    check()
    with pytest.raises(ValueError, match="the model itself cannot be masked: it is masked already"):
        fastmask.mask_(MaskedLinear(3, 3, mask=GumbelMask()), GumbelMask())


def test_wrong_arguments_are_named() -> None:
    wrong: Any = "layer"
    with pytest.raises(TypeError, match="mask: expected a fastmask mask, got str"):
        fastmask.mask_(net(), wrong)
    with pytest.raises(TypeError, match="filter_fn: expected a function"):
        fastmask.mask_(net(), GumbelMask(), wrong)
    for call in (lambda: fastmask.mask_(wrong, GumbelMask()), lambda: fastmask.bake_(wrong)):
        with pytest.raises(TypeError, match="model: expected"):
            call()


def test_a_type_derived_from_a_masked_layer_is_not_undone() -> None:
    class Special(MaskedLinear): ...

    model = nn.Sequential(MaskedLinear(3, 3, mask=GumbelMask()), Special(3, 3, mask=GumbelMask()))
    for undo in (fastmask.unmask_, fastmask.bake_):
        with pytest.raises(ValueError, match="1 is a Special"):
            undo(model)
    assert type(model[0]) is MaskedLinear


def test_every_kind_of_layer_is_one_its_masked_type_derives_from() -> None:
    assert all(issubclass(masked, plain) for plain, masked in MASKED.items())
    assert "torch.nn.modules.activation.MultiheadAttention" in READS_WEIGHTS
