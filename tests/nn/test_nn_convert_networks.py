"""Whole networks, and layers whose parents read weights without calling them."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmask
from fastmask import BitMask, FixedMask, MaskedLinear, ThresholdMask
from fastmask.masks import Mask
from fastmask.nn.conv_same import MaskedConv2dSame
from fastmask.nn.support import MASKED_BY_NAME, READS_WEIGHTS, is_masked
from fastmask.testing import assert_same_bits, values


def ones() -> Mask:
    return ThresholdMask(1.0)


def zeros() -> Mask:
    return ThresholdMask(-1.0)


def timm_net(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm's networks need timm")
    return timm.create_model(name, pretrained=False)


def torchvision_vit(_: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="this ViT is torchvision's")
    # Its own classes, two blocks of twelve; the head starts at zero, which would hide all before it.
    model = models.VisionTransformer(64, 16, 2, 4, 96, 192, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    return model


def torchvision_net(name: str) -> nn.Module:
    models = pytest.importorskip(
        "torchvision.models", reason="torchvision's networks need torchvision"
    )
    return models.get_model(name, weights=None)


NETWORKS: dict[str, tuple[Callable[[str], nn.Module], int]] = {
    "resnet18": (timm_net, 64),
    "tf_efficientnet_lite0": (timm_net, 64),
    "vit_tiny_patch16_224": (timm_net, 224),
    "torchvision resnet18": (torchvision_net, 64),
    "torchvision shufflenet_v2_x0_5": (torchvision_net, 64),
    "torchvision mobilenet_v3_small": (torchvision_net, 64),
    "torchvision vit": (torchvision_vit, 64),
}


def masked(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_masked(module)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_under_full_masks_keeps_every_bit(name: str) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make(name.split()[-1]).eval()
    plain = {n: type(m) for n, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    x = values(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        record = fastmask.mask_(model, ones())
        kinds = nn.Linear | nn.Conv2d | nn.MultiheadAttention
        layers = {n for n, kind in plain.items() if issubclass(kind, kinds)}
        layers -= {n for n in layers if n.endswith(".out_proj")}  # Its attention masks it.
        assert set(record.converted) == layers and not record.skipped
        called: list[nn.Module] = []
        hooks = [
            layer.register_forward_hook(lambda m, *_: called.append(m)) for layer in masked(model)
        ]
        assert_same_bits(model(x), expected)
        assert set(called) == set(masked(model)), "a parent passes by a mask"
        for hook in hooks:
            hook.remove()
        assert fastmask.unmask_(model) == record.converted
        assert {n: type(m) for n, m in model.named_modules()} == plain
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[key], state[key]) for key in state)
        assert_same_bits(model(x), expected)
        fastmask.mask_(model, zeros())
        assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("size", [(7, 8), (9, 6), (1, 1)])
@pytest.mark.parametrize(
    "kernel, stride, dilation, groups", [(3, 2, 1, 4), (2, 3, 1, 1), (5, 2, 2, 2)]
)
def test_timms_convolution_pads_as_it_did(
    size: tuple[int, int], kernel: int, stride: int, dilation: int, groups: int
) -> None:
    layers = pytest.importorskip("timm.layers", reason="Conv2dSame is timm's")
    torch.manual_seed(0)
    layer = layers.Conv2dSame(4, 4, kernel, stride, 0, dilation, groups)
    x = values(2, 4, *size)
    expected = layer(x).detach()
    assert fastmask.mask_(layer, ones()).converted == ("",)
    assert type(layer) is MaskedConv2dSame
    assert_same_bits(layer.eval()(x).detach(), expected)
    copied = pickle.loads(pickle.dumps(layer))
    for other in (copied, layer):
        fastmask.unmask_(other)
        assert type(other) is layers.Conv2dSame and other.weight.requires_grad
        assert_same_bits(other(x).detach(), expected)
    fastmask.mask_(layer, ThresholdMask("kaiming"))
    layer.eval()
    product = layer(x).detach()
    fastmask.bake_(layer)
    assert type(layer) is layers.Conv2dSame
    assert_same_bits(layer(x).detach(), product)


def test_timms_linear_layer_is_converted_and_undone() -> None:
    layers = pytest.importorskip("timm.layers", reason="this Linear is timm's")
    layer, x = layers.Linear(5, 3), values(4, 5)
    expected = layer(x).detach()
    fastmask.mask_(layer, ones())
    assert type(layer) is MaskedLinear
    assert_same_bits(layer.eval()(x).detach(), expected)
    fastmask.unmask_(layer)
    assert type(layer) is layers.Linear


def encoder_layer(**options: bool) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options).eval()


def only_norms(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """An encoder layer all of whose weights are 0, written out: values are biases, and so are outputs."""
    x = layer.norm1(x + layer.self_attn.out_proj.bias)
    return layer.norm2(x + layer.linear2.bias)


def test_an_encoder_layer_does_not_pass_by_its_masks() -> None:
    layer, x = encoder_layer(), values(3, 5, 8)
    with torch.no_grad():
        layer.self_attn.out_proj.bias.copy_(values(8, seed=1))
        fast = layer(x)
        flag = layer.activation_relu_or_gelu
        record = fastmask.mask_(layer, zeros())
        assert record.converted == ("self_attn", "linear1", "linear2") and not record.skipped
        expected = only_norms(layer, x)
        assert_same_bits(layer(x), expected)
        layer.train().eval()
        assert_same_bits(layer(x), expected)
        fastmask.unmask_(layer)
        assert flag == layer.activation_relu_or_gelu != 0
        assert_same_bits(layer(x), fast)
        fastmask.mask_(layer, zeros())
        fastmask.bake_(layer)
        assert layer.activation_relu_or_gelu == flag
        # The fast path sums in another order: a few roundings of numbers of about 3.
        assert (layer(x) - expected).abs().max() < 16 * torch.finfo(torch.float32).eps * 3


def test_attention_alone_takes_its_encoder_off_the_fast_path() -> None:
    layer, x = encoder_layer(), values(3, 5, 8)
    with torch.no_grad():
        fast = layer(x)
        assert fastmask.mask_(layer, zeros(), lambda n, _: n == "self_attn").converted
        assert type(layer.linear1) is nn.Linear and layer.activation_relu_or_gelu == 0
        assert not torch.allclose(layer(x), fast)
        fastmask.unmask_(layer)
        assert_same_bits(layer(x), fast)


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_an_encoder_whose_later_layer_alone_is_masked_reads_no_nested_tensor() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, padding = values(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
        fastmask.mask_(encoder, zeros(), lambda name, _: name.startswith("layers.1.linear"))
        assert not encoder.use_nested_tensor
        out = encoder(x, src_key_padding_mask=padding)
        assert not torch.allclose(out[1:], fast[1:])
        fastmask.mask_(encoder, ones(), lambda name, _: name.startswith("layers.0.linear"))
        assert encoder.layers[1].activation_relu_or_gelu == 0
        fastmask.unmask_(encoder)
        assert encoder.use_nested_tensor
        assert all(layer.activation_relu_or_gelu == 1 for layer in encoder.layers)
        assert_same_bits(encoder(x, src_key_padding_mask=padding), fast)


def test_the_output_projection_of_attention_is_refused_by_name() -> None:
    layer = encoder_layer()
    with pytest.raises(
        ValueError, match=r"self_attn.out_proj cannot be masked: .*read by self_attn"
    ):
        fastmask.mask_(layer, zeros(), lambda n, _: n == "self_attn.out_proj")
    layer.self_attn.out_proj = nn.Linear(8, 8)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="read by self_attn"):
        fastmask.mask_(layer, zeros(), lambda n, _: n == "self_attn.out_proj")
    assert type(layer.linear1) is nn.Linear and layer.activation_relu_or_gelu == 1
    assert fastmask.mask_(layer, zeros(), lambda *_: True).converted[0] == "self_attn"
    # What an attention masks is no layer to be asked about any more.
    fastmask.unmask_(layer.linear1)
    record = fastmask.mask_(
        layer, zeros(), lambda n, m: isinstance(m, nn.Linear) and n != "linear2"
    )
    assert record.converted == ("linear1",)


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_a_transformer_is_converted_whole() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
    source, target = values(3, 5, 8), values(3, 4, 8, seed=1)
    how = {"src_key_padding_mask": torch.arange(5) > torch.tensor([[4], [2], [3]])}
    expected, gradients = model(source, target, **how), []
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.dim() == 1]
    record = fastmask.mask_(model, ones())
    assert {name.rsplit(".", 1)[1] for name in record.converted} == {
        "self_attn", "multihead_attn", "linear1", "linear2",
    }  # fmt: skip
    assert not record.skipped
    model.zero_grad()
    out = model(source, target, **how)
    assert_same_bits(out.detach(), expected.detach())
    out.square().sum().backward()
    for p, want in zip([p for p in model.parameters() if p.dim() == 1], gradients, strict=True):
        assert_same_bits(p.grad, want)
    assert all(p.grad is not None for n, p in model.named_parameters() if ".mask." in n)
    assert fastmask.unmask_(model) == record.converted


def test_an_encoder_cannot_hide_a_fixed_mask_either() -> None:
    layer, x = encoder_layer(), values(3, 5, 8)
    with torch.no_grad():
        fast = layer(x)
        none = FixedMask(BitMask.from_bool(torch.zeros(16, 8, dtype=torch.bool)))
        fastmask.mask_(layer, none, lambda name, _: name == "linear1")
        assert type(layer.linear1) is MaskedLinear and type(layer.linear2) is nn.Linear
        assert not torch.allclose(layer(x), fast)


@pytest.mark.parametrize("reader", [*READS_WEIGHTS, *MASKED_BY_NAME])
def test_types_known_by_name_are_where_they_are_said_to_be(reader: str) -> None:
    module, name = reader.rsplit(".", 1)
    pytest.importorskip(module.split(".")[0], reason=f"{reader} needs its package")
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, nn.Module)


def test_windowed_attention_of_torchvision_is_left_alone_with_the_reason() -> None:
    swin = pytest.importorskip(
        "torchvision.models.swin_transformer", reason="windowed attention needs torchvision"
    )
    for kind in (swin.SwinTransformerBlock, swin.SwinTransformerBlockV2):
        block = kind(8, 2, [2, 2], [0, 0]).eval()
        record = fastmask.mask_(block, zeros(), None)
        assert {"attn.qkv", "attn.proj"} <= set(record.skipped)
        assert "read by attn (ShiftedWindowAttention" in record.skipped["attn.qkv"]
        assert "mlp.0" in record.converted
