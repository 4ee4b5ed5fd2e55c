"""Batch-norm policies: what moves, what is trained, what a task stores, and that `.train()` undoes none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmask.nn import (
    batch_norm_state_dict,
    load_batch_norm_state_dict,
    set_batch_norm_policy,
)
from fastmask.testing import assert_same_bits, values

HELD = ("frozen", "affine")
POLICIES = ("frozen", "affine", "per_task", "shared")
held = pytest.mark.parametrize("policy", HELD)
# `shared` warns wherever it is asked for: what it says has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:batch norm, shared")


def timm_norm() -> nn.Module:
    layers = pytest.importorskip("timm.layers", reason="BatchNormAct2d is timm's")
    return layers.BatchNormAct2d(4, drop_layer=nn.Dropout)


def evo_norm() -> nn.Module:
    layers = pytest.importorskip("timm.layers", reason="EvoNorm2dB0 is timm's")
    return layers.EvoNorm2dB0(4)


# Each with an input: every norm that keeps running statistics.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "1d of sequences": (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4, 5)),
    "2d": (lambda: nn.BatchNorm2d(4), (6, 4, 3, 3)),
    "3d": (lambda: nn.BatchNorm3d(4, affine=False), (6, 4, 3, 3, 2)),
    "sync": (lambda: nn.SyncBatchNorm(4), (6, 4, 3, 3)),
    "instance": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (6, 4, 3, 3),
    ),
    "timm": (timm_norm, (6, 4, 3, 3)),
    "of another package": (evo_norm, (6, 4, 3, 3)),
}
every_norm = pytest.mark.parametrize("kind", NORMS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)),
        nn.GroupNorm(1, 5),
        nn.Dropout(0.5),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    assert list(now) == list(before)
    return {key for key, tensor in before.items() if not torch.equal(tensor, now[key])}


def train(model: nn.Module, *shape: int, steps: int = 2) -> None:
    """Steps of an optimizer that has every parameter, on data far from what the norms saw."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        (model(3 + values(*shape, seed=step)) ** 2).mean().backward()
        optimizer.step()


@every_norm
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_lets_move(kind: str, policy: Any) -> None:
    make, shape = NORMS[kind]
    norm = make()
    # Something that always learns, so that there is a step to take.
    model = nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Flatten(0, 1), norm)
    model.register_parameter("last", nn.Parameter(torch.ones(())))
    model.register_forward_hook(lambda module, _, y: y * module.last)
    record = set_batch_norm_policy(model, policy)
    affine = {f"2.{key}" for key, _ in norm.named_parameters()}
    statistics = set(state(model)) - affine - {"last"}
    if kind == "instance":  # torch's own has the counter and never counts.
        statistics.remove("2.num_batches_tracked")
    assert record.norms == ("2",) and not record.left_alone
    before, expected = state(model), model.eval()(values(*shape)).detach()
    train(model, *shape)
    learns = {"frozen": set(), "affine": affine}.get(policy, affine | statistics)
    assert moved(model, before) == {"last", *learns}
    with torch.no_grad():
        model.last.fill_(1.0)
    same = torch.equal(model.eval()(values(*shape)), expected)
    assert same == (not learns)


@held
def test_training_mode_does_not_undo_it(policy: Any) -> None:
    model = net()
    set_batch_norm_policy(model, policy)
    drop = model[4]
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training == drop.training == mode
        assert not model[1].training and not model[2][2].training
        assert model[1].train(mode) is model[1] and not model[1].training
    with pytest.raises(ValueError, match="boolean"):
        model[1].train("yes")


def test_children_of_a_held_norm_keep_their_mode() -> None:
    norm = timm_norm()
    set_batch_norm_policy(norm, "frozen")
    norm.train()
    assert norm.drop.training and not norm.training


@held
def test_a_held_norm_gives_what_evaluation_gives(policy: Any) -> None:
    model, x = net()[:4], values(6, 3, 8, 8)
    expected = model.eval()(x)
    set_batch_norm_policy(model, policy)
    assert_same_bits(model.train()(x).detach(), expected.detach())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", [True, False])
def test_shared_takes_a_policy_back_exactly(policy: Any, mode: bool) -> None:
    model, plain = net(), net()
    for other in (model, plain):
        other[1].weight.requires_grad_(False)
        other[2][2].eval()
    keys = [set(module.__dict__) for module in model.modules()]
    objects = dict(model.named_parameters())
    set_batch_norm_policy(model, "affine")
    set_batch_norm_policy(model, policy)
    assert model[1].weight.requires_grad == (policy in ("affine", "per_task"))
    if mode:
        model.train()
        plain.train()
    set_batch_norm_policy(model, "shared")
    assert [set(module.__dict__) for module in model.modules()] == keys
    for (_, a), (_, b) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert type(a) is type(b) and a.training == b.training
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert a is objects[name] and a.requires_grad == b.requires_grad
    x = values(6, 3, 8, 8)
    for other in (model, plain):
        torch.manual_seed(1)
        other(x).square().sum().backward()
    assert not moved(model, state(plain))


@held
def test_copies_pickles_saves_and_averages_hold_too(policy: Any) -> None:
    model = net()
    set_batch_norm_policy(model, policy)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    for other in others:
        before = state(other)
        train(other, 6, 3, 8, 8)
        statistics = {"1.running_mean", "2.2.running_var", "2.2.num_batches_tracked"}
        assert not moved(other, before) & statistics
        assert ("1.weight" in moved(other, before)) == (policy == "affine")
        assert model[1].train() is model[1] and other[1].train() is other[1]
        set_batch_norm_policy(other, "shared")
        assert other.train()[1].training and not model.train()[1].training


@pytest.mark.parametrize("policy", POLICIES)
def test_state_dicts_are_those_of_the_plain_network(policy: Any) -> None:
    model, plain = net(), net()
    set_batch_norm_policy(model, policy)
    assert list(model.state_dict()) == list(plain.state_dict())
    train(plain, 6, 3, 8, 8)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert not moved(model, state(plain))
    net().load_state_dict(model.state_dict(), strict=True)
    assert model.train()[1].training == (policy not in HELD)


def test_a_frozen_parameter_is_passed_by_whatever_gradient_it_had() -> None:
    model, x = net(), values(6, 3, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    set_batch_norm_policy(model, "frozen")
    before = state(model)
    optimizer.step()
    changed = moved(model, before)
    assert "0.weight" in changed and not any(key.startswith(("1.", "2.2.")) for key in changed)


def test_statistics_that_are_held_cannot_be_reset() -> None:
    model = net()
    set_batch_norm_policy(model, "frozen")
    before = state(model)
    with pytest.raises(RuntimeError, match="held by the batch-norm policy 'frozen'"):
        torch.optim.swa_utils.update_bn([values(6, 3, 8, 8)], model)
    assert not moved(model, before)
    set_batch_norm_policy(model, "per_task")
    torch.optim.swa_utils.update_bn([values(6, 3, 8, 8)], model)
    assert "1.running_mean" in moved(model, before)


def test_the_record_says_what_it_is_about() -> None:
    # 9 channels: weight, bias, mean and variance of 4 bytes each, and a counter of 8 for each norm.
    said = {
        "frozen": (0, 0, "0 values trained, 0 bytes"),
        "affine": (18, 72, "18 values trained, 72 bytes"),
        "per_task": (18, 160, "18 values trained, 160 bytes"),
        "shared": (18, 0, "the others forget; 18 values trained, 0 bytes"),
    }
    for policy, (trained, size, words) in said.items():
        model: Any = net()
        record = set_batch_norm_policy(model, policy)  # type: ignore[arg-type]
        assert record.norms == ("1", "2.2")
        assert (record.policy, record.channels) == (policy, 9)
        assert (record.trained, record.task_bytes) == (trained, size)
        assert repr(record).startswith(f"batch norm, {policy}: 2 norms of 9 channels: ")
        assert words in repr(record)
        if policy != "shared":
            stored = batch_norm_state_dict(model).values()
            assert sum(t.numel() * t.element_size() for t in stored) == size


def test_resnet18_is_what_the_literature_counts() -> None:
    models = pytest.importorskip("torchvision.models", reason="ResNet-18 is torchvision's")
    record = set_batch_norm_policy(models.resnet18(weights=None), "per_task")
    assert (len(record.norms), record.channels) == (20, 4_800)
    # 4 float32 vectors, and 20 counters.
    assert record.task_bytes == 4 * 4 * 4_800 + 20 * 8


def test_what_has_nothing_to_hold_is_named() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    model = nn.ModuleDict(
        {
            "constant": ops.FrozenBatchNorm2d(4),
            "without": nn.BatchNorm2d(4, track_running_stats=False),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "layer": nn.LayerNorm(4),
            "traced": torch.export.export(net().eval(), (values(2, 3, 8, 8),)).module(),
        }
    )
    record = set_batch_norm_policy(model, "affine")
    assert not record.norms and record.task_bytes == 0
    assert record.left_alone == {
        "constant": "it is constant already (FrozenBatchNorm2d)",
        "without": "it keeps no statistics and always normalises by the batch",
        "traced.1": "it is part of a traced graph, whose mode is fixed",
        "traced.2.2": "it is part of a traced graph, whose mode is fixed",
    }
    assert "no norm with running statistics" in repr(record)
    assert "- constant: it is constant already" in repr(record)
    assert model["without"].weight.requires_grad and model["layer"].training
    assert batch_norm_state_dict(nn.Linear(2, 2)) == {}


def test_shared_warns_where_there_is_something_to_forget() -> None:
    with pytest.warns(UserWarning, match="2 norms learn from every task"):
        set_batch_norm_policy(net(), "shared")


@pytest.mark.filterwarnings("error")
def test_a_network_without_norms_is_no_error() -> None:
    for policy in POLICIES:
        record = set_batch_norm_policy(nn.Linear(3, 3), policy)  # type: ignore[arg-type]
        assert repr(record).endswith("no norm with running statistics, nothing to do")


@pytest.mark.parametrize("policy", ["affine", "per_task"])
def test_tasks_come_and_go_without_forgetting(policy: Any) -> None:
    model, x = net(), values(6, 3, 8, 8)
    set_batch_norm_policy(model, policy)
    for backbone in (model[0], model[2][1], model[3]):
        backbone.requires_grad_(False)
    outputs, payloads = [], []
    for task in range(2):
        train(model, 6 + task, 3, 8, 8)
        outputs.append(model.eval()(x).detach())
        payloads.append(batch_norm_state_dict(model))
    assert not torch.equal(*outputs)
    assert payloads[0].keys() == payloads[1].keys() <= model.state_dict().keys()
    assert ("1.running_var" in payloads[0]) == (policy == "per_task")
    for output, payload in zip(outputs, payloads, strict=True):
        objects = list(model.parameters())
        load_batch_norm_state_dict(model, payload)
        assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
        assert_same_bits(model.eval()(x).detach(), output)
    fresh = pickle.loads(pickle.dumps(model))
    load_batch_norm_state_dict(fresh, payloads[0])
    assert_same_bits(fresh.eval()(x).detach(), outputs[0])


def test_a_payload_loads_whole_or_not_at_all() -> None:
    model = net()
    set_batch_norm_policy(model, "per_task")
    payload = batch_norm_state_dict(model)
    before = state(model)
    for tensor in payload.values():
        tensor.add_(1)
    wrong = {
        r"missing \['1.bias'\], unknown \['stranger'\]": {
            "stranger" if key == "1.bias" else key: tensor for key, tensor in payload.items()
        },
        r"expected 2.2.bias of shape \(5,\), got \(4,\)": payload | {"2.2.bias": torch.ones(4)},
        "expected 2.2.bias of dtype torch.float32, got torch.float64": payload
        | {"2.2.bias": torch.ones(5).double()},
    }
    for words, other in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"state: .*{words}.*nothing was changed"):
            load_batch_norm_state_dict(model, other)
        assert not moved(model, before)
    set_batch_norm_policy(model, "affine")
    with pytest.raises(ValueError, match=r"unknown \['1.num_batches_tracked'"):
        load_batch_norm_state_dict(model, payload)
    for ask in (batch_norm_state_dict, lambda m: load_batch_norm_state_dict(m, {})):
        with pytest.raises(ValueError, match="1 has none or 'shared'"):
            ask(net())


def test_what_it_refuses() -> None:
    wrong: Any = "norm"
    with pytest.raises(ValueError, match="policy: expected one of 'frozen', .*, got 'norm'"):
        set_batch_norm_policy(net(), wrong)
    for call in (
        set_batch_norm_policy,
        batch_norm_state_dict,
        lambda model: load_batch_norm_state_dict(model, {}),
    ):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            call(wrong)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    keys = set(model[0].__dict__)
    with pytest.raises(ValueError, match="1 is lazy"):
        set_batch_norm_policy(model)
    assert set(model[0].__dict__) == keys and model[0].training


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_norm_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="0 is scripted"):
        set_batch_norm_policy(model)


def test_policies_of_parts_stand_side_by_side() -> None:
    model = net()
    set_batch_norm_policy(model, "per_task")
    set_batch_norm_policy(model[2], "frozen")
    assert {key.rsplit(".", 1)[0] for key in batch_norm_state_dict(model)} == {"1"}
    model.train()
    assert model[1].training and not model[2][2].training
