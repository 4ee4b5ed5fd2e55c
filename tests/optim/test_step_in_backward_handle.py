"""What step_in_backward returns: scalers, schedulers, state dicts, groups, copies, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from masked_nets import SGD, Net, loss_of, scores_of
from torch import nn

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.masks import FixedMask, ThresholdMask
from fastmask.nn import MaskedConv2d, MaskedLinear
from fastmask.optim import protect, step_in_backward
from fastmask.testing import assert_same_bits, values


@pytest.mark.filterwarnings("ignore:Using backward")
def test_what_the_backward_refuses() -> None:
    net = Net()
    handle = step_in_backward(net, lr=0.1)
    before = [s.clone() for s in scores_of(net)]

    def refuse(match: str, **options: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            loss_of(net, values(4, 9)).backward(**options)

    refuse("expected create_graph=False", create_graph=True)
    other = scores_of(net)[1].register_post_accumulate_grad_hook(lambda _: None)
    refuse("expected no other hook after the accumulation")
    other.remove()
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
    ):
        refuse("expected one process, got 2")
    for scores, old in zip(scores_of(net), before, strict=True):
        assert_same_bits(scores, old)
        assert scores.grad is None
    for again in (True, False):
        loss = loss_of(net, values(4, 9))
        loss.backward(retain_graph=again)
        moved = [s.clone() for s in scores_of(net)]
        with pytest.raises(RuntimeError, match="scores have changed" if again else "second time"):
            loss.backward()
        for scores, old in zip(scores_of(net), moved, strict=True):
            assert_same_bits(scores, old)
    # Another graph of the scores as they were.
    stale = loss_of(net, values(4, 9))
    loss_of(net, values(4, 9)).backward()
    with pytest.raises(RuntimeError, match="scores have changed since the forward"):
        stale.backward()
    handle.remove()


def test_a_scaler_unscales_and_skips_what_is_not_finite() -> None:
    net, twin = Net(ThresholdMask()), Net(ThresholdMask())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step_in_backward(net, scaler=scaler, **SGD)
    optimizer = torch.optim.SGD(scores_of(twin), foreach=False, **SGD)
    rest = torch.optim.SGD(net.head.parameters(), lr=0.0)
    x = values(4, 9)
    for _ in range(2):
        scaler.scale(loss_of(net, x)).backward()
        scaler.step(rest)
        scaler.update()
        loss_of(twin, x).backward()
        optimizer.step()
        for one in (optimizer, rest):
            one.zero_grad()
    for mine, theirs in zip(scores_of(net), scores_of(twin), strict=True):
        assert_same_bits(mine, theirs)
    # An infinite gradient of one output reaches the scores of its row of the last masked layer.
    before = [s.clone() for s in scores_of(net)]
    hidden = net.second(torch.relu(net.first(x)))
    hidden.register_hook(lambda g: g.index_fill(1, torch.tensor([2]), float("inf")))
    scaler.scale(net.head(hidden).square().mean()).backward()
    moved = scores_of(net)[1] != before[1]
    assert not moved[2].any() and moved[[0, 1, 3, 4, 5, 6, 7, 8]].any(dim=1).all()
    assert all(s.isfinite().all() for s in scores_of(net))


def test_float16_wants_a_scaler() -> None:
    layer = MaskedLinear(4, 4, mask=ThresholdMask()).half()
    conv = MaskedConv2d(4, 4, 1, mask=ThresholdMask())
    for one in (layer, conv):
        handle = step_in_backward(one, lr=0.1)
        x = torch.ones(2, 4).half() if one is layer else torch.ones(2, 4, 1, 1)
        with (
            pytest.raises(ValueError, match="scaler: expected the GradScaler"),
            torch.autocast("cpu", dtype=torch.float16, enabled=one is conv),
        ):
            one(x)
        handle.remove()
    step_in_backward(layer, lr=0.1, scaler=torch.amp.GradScaler("cpu", enabled=False))
    before = layer.mask.own_scores().clone()
    layer(torch.ones(2, 4).half()).sum().backward()
    assert not torch.equal(layer.mask.own_scores(), before)


def test_schedulers_rule_and_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    net = Net(ThresholdMask())
    handle = step_in_backward(net, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(handle, step_size=1, gamma=0.0)
    loss_of(net, values(4, 9)).backward()
    schedule.step()
    before = [s.clone() for s in scores_of(net)]
    loss_of(net, values(4, 9)).backward()
    handle.step()
    handle.zero_grad()
    for scores, old in zip(scores_of(net), before, strict=True):
        assert_same_bits(scores, old)
    assert not recwarn.list


def test_state_dicts_are_torchs_both_ways() -> None:
    net, twin = Net(ThresholdMask()), Net(ThresholdMask())
    handle = step_in_backward(net, **SGD)
    optimizer = torch.optim.SGD(scores_of(twin), lr=5.0, foreach=False)
    loss_of(net, values(4, 9)).backward()
    file = io.BytesIO()
    torch.save((net.state_dict(), handle.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    twin.load_state_dict(weights)
    optimizer.load_state_dict(state)
    loss_of(twin, values(4, 9, seed=1)).backward()
    optimizer.step()
    loss_of(net, values(4, 9, seed=1)).backward()
    for mine, theirs in zip(scores_of(net), scores_of(twin), strict=True):
        assert_same_bits(mine, theirs)
    resumed = Net(ThresholdMask())
    resumed.load_state_dict(twin.state_dict())
    again = step_in_backward(resumed, lr=7.0)
    again.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    for one in (resumed, net):
        loss_of(one, values(4, 9, seed=2)).backward()
    for mine, theirs in zip(scores_of(resumed), scores_of(net), strict=True):
        assert_same_bits(mine, theirs)


def test_groups_of_parameters_and_removal() -> None:
    net = Net(ThresholdMask())
    first, second = scores_of(net)
    handle = step_in_backward([{"params": [first], "lr": 0.0}], lr=1.0)
    handle.add_param_group({"params": second, "weight_decay": 0.5})
    before = first.clone(), second.clone()
    closed = handle.step(lambda: loss_of(net, values(4, 9)).backward())
    assert closed is None
    assert_same_bits(first, before[0])
    assert not torch.equal(second, before[1])
    loss = loss_of(net, values(4, 9))
    handle.remove()
    now = second.clone()
    loss.backward()
    assert second.grad is not None
    assert_same_bits(second, now)
    second.grad = None
    # Any leaf can take its steps so; others may take them from here.
    bias = net.first.bias
    step_in_backward([("bias", bias)], lr=1.0)
    old = bias.clone()
    loss_of(net, values(4, 9)).backward()
    assert bias.grad is None
    assert not torch.equal(bias, old)


def test_copies_of_the_model_do_not_step() -> None:
    net = Net(ThresholdMask())
    handle = step_in_backward(net, lr=1.0)
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = scores_of(one)[0].clone()
        loss_of(one, values(4, 9)).backward()
        assert_same_bits(scores_of(one)[0], before)
        assert scores_of(one)[0].grad is not None
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copies would step nothing"):
            copied(handle)


def test_a_model_that_moves_keeps_its_steps() -> None:
    net = Net(ThresholdMask())
    step_in_backward(net, **SGD)
    net.to(torch.float64)  # scores stay float32
    loss_of(net, values(4, 9).double()).backward()
    net.to(torch.float32)
    before = scores_of(net)[0].clone()
    scores_of(net)[0].data = scores_of(net)[0].data.clone()
    loss_of(net, values(4, 9)).backward()
    assert not torch.equal(scores_of(net)[0], before)


def test_functions_step_like_layers() -> None:
    scores = values(5, 9).requires_grad_()
    step_in_backward([scores], lr=0.5)
    x, w, before = values(3, 9), values(5, 9, seed=1), scores.detach().clone()
    ops.learned_linear(x, w, scores, method="threshold").sum().backward()
    leaf = before.clone().requires_grad_()
    ops.learned_linear(x, w, leaf, method="threshold").sum().backward()
    assert_same_bits(scores.detach(), before - 0.5 * leaf.grad)
    assert scores.grad is None


def test_what_it_refuses() -> None:
    net = Net()
    plain = nn.Sequential(nn.Linear(3, 3), MaskedLinear(3, 3, mask=FixedMask(_ones())))
    with pytest.raises(ValueError, match="scores: expected a module with learned masks"):
        step_in_backward(plain)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        step_in_backward(net, lr=-1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        step_in_backward([])
    with pytest.raises(TypeError, match="scores: expected a torch.Tensor, got int"):
        step_in_backward([1])
    with pytest.raises(TypeError, match="scores: expected dtype float32"):
        step_in_backward([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    first, second = scores_of(net)
    with pytest.raises(ValueError, match="non-leaf"):
        step_in_backward([second, first * 2])
    handle = step_in_backward([first], lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(9, 9\) takes its steps in the backward already"):
        step_in_backward([second, first])
    step_in_backward([second]).remove()
    with pytest.raises(TypeError, match=r"expected no hook of step\(\)"):
        protect(handle, {first: BitMask.from_bool(first > 0)})


def _ones() -> BitMask:
    return BitMask.from_bool(torch.ones(3, 3, dtype=torch.bool))
