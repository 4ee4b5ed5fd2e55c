"""Masks over layers of the backbone: what is trained, what stays, and what a sweep over them leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmask.backbones import Backbone
from fastmask.data import DomainSet, Features
from fastmask.errors import FrozenEntriesMoved
from fastmask.optim import MaskedSGD
from fastmask.transfer import Config, recall
from fastmask.transfer import run as sweep
from fastmask.transfer.domains import Domain
from fastmask.transfer.network import masks, pictures
from fastmask.transfer.network import source as stage_1
from fastmask.transfer.network import sweep as layer_sweep
from fastmask.transfer.network import target as stage_3
from fastmask.transfer.network.model import Network, accuracy, area, choose, size
from fastmask.transfer.network.source import Source
from fastmask.transfer.plan import Run

Settings = Callable[..., Config]
LAST, OUTPUT = "backbone.12.weight", "head.output.weight"
SUPPORTED = ("naive", "editor", "binary", "kl", "magnitude", "random")


def prepared(
    config: Config, domains: DomainSet, backbone: Backbone
) -> tuple[Network, dict[str, Domain]]:
    base, _ = layer_sweep._network(config, backbone, 10)
    return base, pictures.load(config, domains, backbone.transform, base.hold, None)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, whatever the memory format."""
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


# Which layers.


def test_layers_are_chosen_by_name_pattern_or_the_module_around_them() -> None:
    net = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "stage1": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)),
            "stage10": nn.Sequential(nn.Conv2d(4, 4, 3)),
        }
    )
    assert choose(net, ("stage1",)) == ("stage1.0", "stage1.2")
    assert choose(net, ("stage1.*",)) == ("stage1.0", "stage1.2")
    assert choose(net, ("stage1.2", "stem")) == ("stem", "stage1.2")
    assert choose(net, ("*",)) == ("stem", "stage1.0", "stage1.2", "stage10.0")


def test_a_layer_that_is_not_there_or_takes_no_mask_is_refused_by_name(
    layered: Settings, backbone: Backbone
) -> None:
    said = (
        r"layers: expected names or patterns of the backbone's linear layers and convolutions "
        r"\(0, 4, 8, 12\), got '13'"
    )
    config = layered(layers=("12", "13"))
    with pytest.raises(ValueError, match=said):
        sweep(config)
    assert not Path(config.out).exists()
    with pytest.raises(ValueError, match="layers: up cannot be masked: ConvTranspose2d is not"):
        choose(nn.ModuleDict({"up": nn.ConvTranspose2d(2, 2, 2)}), ("up",))


def test_what_layers_cannot_go_with_is_refused(
    layered: Settings, features: dict[str, Features]
) -> None:
    with pytest.raises(ValueError, match="strategies: lowrank works on the head alone"):
        layered(strategies=("binary", "lowrank"))
    with pytest.raises(ValueError, match="features: expected none with layers"):
        sweep(layered(), features=features)
    for name in ("layers_lr", "layers_target_lr"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number and above 0"):
            layered(**{name: 0.0})


# The network.


@pytest.mark.parametrize(("layers", "stem"), [("12", 12), ("4", 4), ("0", 0)])
def test_the_stem_computed_once_changes_no_bit(
    layers: str, stem: int, layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    base, _ = prepared(layered(layers=(layers,)), domains, backbone)
    assert len(base._stem) == stem
    seen = torch.stack([domains.image("neon", row) for row in range(16)])
    whole = backbone.module(backbone.transform.scaled(seen))
    assert equal(base.features(base.hold(seen)), whole)
    assert equal(base(base.hold(seen)), base.head(base.head.inputs(whole)))


def test_norms_that_learn_are_no_part_of_the_stem(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    base, _ = prepared(layered(bn_policy="affine"), domains, backbone)
    # The first norm comes after the first convolution, whose output is always the same.
    assert base._stem == ("0",)


def test_units_of_steps_by_hand() -> None:
    conv, norm = nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(2, 1, 1, 2))
        norm.weight.copy_(torch.tensor([1.0, 3.0]))
    assert size(conv) == math.sqrt(26 / 4)
    assert area(conv) == (25 + 1) / 2
    assert (size(norm), area(norm)) == (math.sqrt(5), 5.0)


def test_the_scale_of_a_layer_before_a_norm_moves_no_bit_of_the_rest(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered()
    base, parts, source = learned(config, domains, backbone)
    # Twice the weights under a norm of twice the mean and four times the variance: the same function,
    # and by a power of two the same roundings.
    twice = base.with_values({LAST: 2 * base.state_dict()[LAST]})
    norm = twice.get_submodule("backbone.13")
    norm.running_mean.mul_(2)
    norm.running_var.mul_(4)
    norm.eps *= 4
    values = {**source.trained, LAST: 2 * source.trained[LAST]}
    other = Source("handwritten", 0, source.initial, values, 0.0)
    run = Run("handwritten", "printed", "none", "source-end", 0)
    part = parts["printed"].train
    plain, _ = stage_3.fine_tune(config, base, source, run, part, None)
    scaled, _ = stage_3.fine_tune(config, twice, other, run, part, None)
    assert not equal(plain.state_dict()[LAST], source.trained[LAST])
    assert equal(scaled.state_dict()[LAST], 2 * plain.state_dict()[LAST])
    assert equal(scaled.state_dict()[OUTPUT], plain.state_dict()[OUTPUT])


# What moves.


def learned(
    config: Config, domains: DomainSet, backbone: Backbone
) -> tuple[Network, dict[str, Domain], Source]:
    base, parts = prepared(config, domains, backbone)
    source = stage_1.train(config, base, "handwritten", parts["handwritten"].train, 0)
    return base, parts, source


@pytest.mark.filterwarnings("ignore:batch norm, shared")
@pytest.mark.parametrize("train_unmasked", [False, True])
@pytest.mark.parametrize("policy", ["frozen", "affine", "per_task", "shared"])
def test_only_free_entries_and_what_the_policy_trains_move(
    policy: str,
    train_unmasked: bool,
    layered: Settings,
    domains: DomainSet,
    backbone: Backbone,
) -> None:
    # Decay and momentum would move frozen entries if gradients alone were zeroed.
    config = layered(
        bn_policy=policy, train_unmasked=train_unmasked, target_weight_decay=0.01, target_lr=1.0
    )
    base, parts, source = learned(config, domains, backbone)
    untouched = {name: value.clone() for name, value in base.state_dict().items()}
    frozen = masks.find(config, "random", base, source, parts["handwritten"].train).frozen
    run = Run("handwritten", "printed", "random", "source-start", 0)
    network, _ = stage_3.fine_tune(config, base, source, run, parts["printed"].train, frozen)
    norms = [f"backbone.{i}" for i in (1, 5, 9, 13)]
    affine = {f"{norm}.{key}" for norm in norms for key in ("weight", "bias")}
    statistics = {
        f"{norm}.{key}"
        for norm in norms
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    moving = {LAST, OUTPUT}
    moving |= {"head.output.bias"} if train_unmasked else set()
    moving |= affine if policy != "frozen" else set()
    moving |= statistics if policy in ("per_task", "shared") else set()
    for name, value in network.state_dict().items():
        began = source.trained.get(name, untouched[name])
        if name in frozen:
            ones = frozen[name].to_bool()
            assert equal(value[ones], source.trained[name][ones]), name
            assert not equal(value[~ones], source.initial[name][~ones]), name
        elif name in moving:
            assert not equal(value, began), name
        else:
            assert equal(value, began), name
    # Neither stage writes into the network that all runs share.
    assert all(equal(value, untouched[name]) for name, value in base.state_dict().items())
    assert set(base.moved_by_stage_3(train_unmasked)) == moving


def test_a_frozen_entry_or_a_buffer_that_moves_is_noticed(
    layered: Settings, domains: DomainSet, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(MaskedSGD):
        def __init__(self, params: Any, *, frozen: Any, **given: Any) -> None:
            super().__init__(params, **given)

    def drift(network: Network, now: bool) -> None:
        network.get_submodule("backbone.13").training = now

    config = layered()
    base, parts, source = learned(config, domains, backbone)
    frozen = masks.find(config, "random", base, source, parts["handwritten"].train).frozen
    run = Run("handwritten", "printed", "random", "source-start", 0)
    with monkeypatch.context() as patch:
        patch.setattr(stage_3, "MaskedSGD", Careless)
        with pytest.raises(FrozenEntriesMoved, match="backbone.12.weight: .* of 15206 frozen"):
            stage_3.fine_tune(config, base, source, run, parts["printed"].train, frozen)
    monkeypatch.setattr(Network, "learning", drift)
    with pytest.raises(FrozenEntriesMoved, match="backbone.13.running_mean: 64 of 64"):
        stage_3.fine_tune(config, base, source, run, parts["printed"].train, frozen)


def test_free_entries_start_as_asked(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered()
    base, parts, source = learned(config, domains, backbone)
    frozen = masks.find(config, "magnitude", base, source, parts["handwritten"].train).frozen
    pretrained = base.state_dict()[LAST]
    assert not equal(source.trained[LAST], pretrained) and equal(source.initial[LAST], pretrained)

    def start(name: str) -> torch.Tensor:
        run = Run("handwritten", "printed", "magnitude", name, 0)
        return stage_3.start_values(source, run, frozen)[LAST]

    ones = frozen[LAST].to_bool()
    assert equal(start("source-end"), source.trained[LAST])
    assert equal(start("source-start"), torch.where(ones, source.trained[LAST], pretrained))
    drawn = start("random")
    assert equal(drawn[ones], source.trained[LAST][ones])
    bound = 1 / math.sqrt(48 * 9)
    # 12,442 uniform numbers all lie within 0.99 of the bound with probability 0.99^12,442 = e^-125.
    assert 0.99 * bound < drawn[~ones].abs().max() <= bound


def test_norms_of_a_task_are_put_back(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered(bn_policy="per_task")
    base, parts, source = learned(config, domains, backbone)
    run = Run("handwritten", "printed", "none", "source-end", 0)
    network, _ = stage_3.fine_tune(config, base, source, run, parts["printed"].train, None)
    changed = network.state_dict()["backbone.5.running_mean"].clone()
    network.take_norms(source.trained)
    assert not equal(changed, source.trained["backbone.5.running_mean"])
    for name in source.trained:
        if name.startswith(("backbone.1.", "backbone.5.", "backbone.9.", "backbone.13.")):
            assert equal(network.state_dict()[name], source.trained[name]), name


# The masks.


def test_every_strategy_masks_every_layer(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered(editor_rule="quantile", editor_share=0.3, density=0.4)
    base, parts, source = learned(config, domains, backbone)
    state = torch.get_rng_state()
    for strategy in SUPPORTED:
        found, again = (
            masks.find(config, strategy, base, source, parts["handwritten"].train) for _ in range(2)
        )
        assert list(found.frozen) == [LAST, OUTPUT]
        assert found.frozen == again.frozen
        for name, mask in found.frozen.items():
            share = {"editor": 0.3, "naive": mask.density}.get(strategy, 0.4)
            assert mask.count() == math.floor(share * mask.numel() + 0.5), strategy
            assert 0 < mask.density < 1
            if strategy in ("editor", "binary", "kl"):
                assert found.scores[name].shape == mask.shape
                assert found.scores[name].std() > 0
    # What is drawn has generators of its own: torch's, which all threads share, stays where it was.
    assert torch.equal(state, torch.get_rng_state())


def test_a_global_scope_shares_the_density_out(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered(scope="global", density=0.4)
    base, parts, source = learned(config, domains, backbone)
    entries = 64 * 48 * 9 + 2560
    for strategy in ("binary", "magnitude", "random"):
        found = masks.find(config, strategy, base, source, parts["handwritten"].train)
        ones = [mask.count() for mask in found.frozen.values()]
        assert sum(ones) == math.floor(0.4 * entries + 0.5), strategy
        assert ones[1] != math.floor(0.4 * 2560 + 0.5), strategy
        assert found.density == sum(ones) / entries


def test_the_logits_of_a_weight_that_nothing_reads_fall_by_the_regulariser_alone(
    layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered(mask_steps=1, mask_lr=0.25, mask_clip=None)
    base, parts, source = learned(config, domains, backbone)
    values = {**source.trained, OUTPUT: torch.zeros_like(source.trained[OUTPUT])}
    quiet = Source("handwritten", 0, source.initial, values, 0.0)
    found = masks.find(config, "binary", base, quiet, parts["handwritten"].train)
    # Under an output layer of zeros no convolution matters: without a gradient there is no unit of beta.
    assert (found.scores[LAST] == config.logit_init).all()
    # One step of Adam is its whole length, against the sign of the gradient.
    absolute = layered(mask_steps=1, mask_lr=0.25, mask_clip=None, beta_unit="absolute", out="x")
    found = masks.find(absolute, "binary", base, quiet, parts["handwritten"].train)
    assert torch.allclose(found.scores[LAST], torch.tensor(1.75), rtol=1e-6, atol=0)


# The way back.


@pytest.mark.parametrize("policy", ["frozen", "per_task"])
def test_the_source_network_can_be_recalled(
    policy: str, layered: Settings, domains: DomainSet, backbone: Backbone
) -> None:
    config = layered(
        strategies=("magnitude",), bn_policy=policy, train_unmasked=True, exact_recall=True
    )
    result = sweep(config)
    base, parts, source = learned(config, domains, backbone)
    found = masks.find(config, "magnitude", base, source, parts["handwritten"].train)
    run = Run("handwritten", "printed", "magnitude", "source-start", 0)
    network, _ = stage_3.fine_tune(config, base, source, run, parts["printed"].train, found.frozen)
    recall(result.folder / "masks" / "handwritten-magnitude-seed0.safetensors", network)
    trained = base.with_values(source.trained)
    for name, value in trained.state_dict().items():
        assert equal(network.state_dict()[name], value), name
    test = parts["handwritten"].test
    assert accuracy(network, test.x, test.y) == result.rows[0].source_accuracy_before
