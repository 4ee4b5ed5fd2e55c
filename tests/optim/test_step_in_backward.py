"""step_in_backward: the steps of torch.optim.SGD, taken in the backward, and no gradient left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from masked_nets import MASKS, SGD, Net, loss_of, scores_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask import _backend
from fastmask.masks import GumbelMask, ThresholdMask
from fastmask.nn import MaskedConv2d, MaskedLinear, MaskedMultiheadAttention, prepared
from fastmask.ops import _stepping
from fastmask.ops._stepping import ScoreStep
from fastmask.optim import step_in_backward
from fastmask.testing import assert_same_bits, values


@pytest.fixture(autouse=True)
def gradients_made() -> Iterator[list[bool]]:
    """Whether each step of scores was taken along a gradient tensor."""
    settle, made = _stepping.ScoreStep._settle, []

    def seen(self: Any, scores: Any, rule: Any, deferred: Any) -> None:
        made.append(len(deferred) != 1 or scores.grad is not None)
        settle(self, scores, rule, deferred)

    with mock.patch.object(_stepping.ScoreStep, "_settle", seen):
        yield made


def assert_as_sgd(
    model: nn.Module,
    backward: Callable[[nn.Module, Tensor], None] = lambda m, x: loss_of(m, x).backward(),
    steps: int = 3,
    **options: Any,
) -> None:
    """Train a copy by torch.optim.SGD and the model in its backwards: all bits are equal after each step."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(scores_of(twin), foreach=False, **SGD, **options)
    handle = step_in_backward(model, **SGD, **options)
    try:
        for i in range(steps):
            for one in (model, twin):
                torch.manual_seed(i)
                x = values(4, 9, seed=i).requires_grad_()
                backward(one, x)
                one.given = x.grad  # type: ignore[assignment]
            optimizer.step()
            optimizer.zero_grad()
            assert all(s.grad is None for s in scores_of(model))
            for name, theirs in twin.named_parameters():
                mine = model.get_parameter(name)
                assert_same_bits(mine, theirs)
                if theirs.grad is not None:
                    assert_same_bits(mine.grad, theirs.grad)
            assert_same_bits(model.given, twin.given)
            model.zero_grad()
            twin.zero_grad()
        for mine, theirs in zip(scores_of(model), scores_of(twin), strict=True):
            held, torchs = handle.state.get(mine, {}), optimizer.state.get(theirs, {})
            assert held.keys() == torchs.keys()
            for key, momentum in held.items():
                assert_same_bits(momentum, torchs[key])
    finally:
        handle.remove()


@pytest.mark.parametrize("mask", MASKS)
def test_every_bit_is_that_of_backward_and_step(mask: str, gradients_made: list[bool]) -> None:
    """Scores, momenta, and the gradients of inputs, biases and the head, which see the old scores."""
    assert_as_sgd(Net(MASKS[mask]))
    assert gradients_made == [False] * 6, "no gradient of scores is ever made"
    assert_as_sgd(Net(MASKS[mask]), maximize=True, steps=1)


@pytest.mark.skipif(bool(_backend.missing("cpu")), reason="the reference makes the gradient")
@pytest.mark.parametrize("stepping", [False, True])
def test_no_tensor_holds_the_gradient(stepping: bool) -> None:
    net = Net()
    if stepping:
        step_in_backward(net, lr=0.1)
    sizes, made = [], torch.Tensor.new_empty

    def seen(*args: Any, **options: Any) -> Tensor:
        sizes.append(tuple(made(*args, **options).shape))
        return made(*args, **options)

    loss = loss_of(net, values(4, 9))
    with mock.patch.object(torch.Tensor, "new_empty", seen):
        loss.backward()
    assert ((9, 9) in sizes) != stepping


def test_work_of_other_streams_is_waited_for() -> None:
    """Of CUDA's streams nothing but the order is seen here."""
    net, log = Net(), []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append((self.name, other.name))

    step = ScoreStep(net.first.mask.own_scores(), mock.Mock())
    first, second = Stream("first"), Stream("second")
    step._streams = {first, second}  # type: ignore[arg-type]
    with mock.patch("torch.cuda.current_stream", return_value=second):
        with step._in_order(net.first.mask.own_scores()):
            assert log == [("second", "first")]
            log.append(("step", "now"))
        assert log[1:] == [("step", "now"), ("first", "second")]
        with step._in_order(net.first.mask.own_scores()):
            pass
    assert len(log) == 3


def test_where_torch_calls_no_hook_of_a_tensor_without_gradient() -> None:
    """As versions before 2.15 may have it: the hook of the node that would accumulate takes the step."""
    net, twin = Net(ThresholdMask()), Net(ThresholdMask())
    handle = step_in_backward(net, lr=0.1)
    x = values(4, 9)
    loss = loss_of(net, x)
    for step, _ in handle._steps.values():
        step._handle.remove()
    loss.backward()
    loss_of(twin, x).backward()
    for mine, theirs in zip(scores_of(net), scores_of(twin), strict=True):
        assert theirs.grad is not None
        assert mine.grad is None
        assert_same_bits(mine, theirs - 0.1 * theirs.grad)


def test_scores_used_twice_take_one_step(gradients_made: list[bool]) -> None:
    assert_as_sgd(Net(shared=True))
    assert gradients_made == [True] * 3
    # What a backward that raises leaves behind is not added to the next one's.
    net = Net(shared=True)
    twin = copy.deepcopy(net)
    step_in_backward(net, lr=0.1)

    def fail(_: Tensor) -> None:
        raise RuntimeError("on purpose")

    hidden = net.first(values(4, 9))
    hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        net.first(hidden).sum().backward()
    for one in (net, twin):
        torch.manual_seed(3)
        loss_of(one, values(4, 9)).backward()
    scores, theirs = net.first.mask.own_scores(), twin.first.mask.own_scores()
    assert_same_bits(scores, theirs - 0.1 * theirs.grad)


def test_penalties_on_scores_are_part_of_the_step(gradients_made: list[bool]) -> None:
    def backward(net: nn.Module, x: Tensor) -> None:
        dense = [m.mask.expected_density() for m in net.modules() if isinstance(m, MaskedLinear)]
        (loss_of(net, x) + sum(dense)).backward()

    assert_as_sgd(Net(), backward)
    assert gradients_made == [True] * 6


def test_hooks_of_the_scores_see_their_gradient(gradients_made: list[bool]) -> None:
    net = Net()
    scores = net.first.mask.own_scores()
    before, second = scores.clone(), net.second.mask.own_scores().clone()
    step_in_backward(net, lr=0.1)
    scores.register_hook(torch.zeros_like)
    loss_of(net, values(4, 9)).backward()
    assert_same_bits(scores, before)
    assert not torch.equal(net.second.mask.own_scores(), second)
    assert gradients_made == [False, True]


def test_accumulation(gradients_made: list[bool]) -> None:
    net, twin = Net(ThresholdMask()), Net(ThresholdMask())
    optimizer = torch.optim.SGD(scores_of(twin), foreach=False, **SGD)
    handle = step_in_backward(net, **SGD)
    batches = [values(4, 9, seed=i) for i in range(3)]
    with handle.accumulate():
        for x in batches[:2]:
            loss_of(net, x).backward()
    for x in batches:
        loss_of(twin, x).backward()
    for mine, theirs in zip(scores_of(net), scores_of(twin), strict=True):
        assert mine.grad is not None
        assert_same_bits(mine, theirs)
    loss_of(net, batches[2]).backward()
    optimizer.step()
    for mine, theirs in zip(scores_of(net), scores_of(twin), strict=True):
        assert mine.grad is None
        assert_same_bits(mine, theirs)
    assert gradients_made == [True, True]


def test_autograd_grad_steps_nothing() -> None:
    net = Net()
    step_in_backward(net, lr=0.1)
    before = [s.clone() for s in scores_of(net)]
    x = values(4, 9).requires_grad_()
    torch.manual_seed(1)
    (dx,) = torch.autograd.grad(loss_of(net, x), x)
    torch.manual_seed(1)
    grads = torch.autograd.grad(loss_of(net, x), [x, *scores_of(net)])
    assert_same_bits(grads[0], dx)
    assert all(g.any() for g in grads)
    loss_of(net, x).backward(inputs=[x])
    for scores, old in zip(scores_of(net), before, strict=True):
        assert_same_bits(scores, old)
    loss_of(net, x).backward(inputs=scores_of(net)[:1])
    assert not torch.equal(scores_of(net)[0], before[0])
    assert_same_bits(scores_of(net)[1], before[1])


def test_scores_that_are_frozen_or_evaluated_stay() -> None:
    net = Net()
    step_in_backward(net, lr=0.1, weight_decay=0.1)
    frozen, evaluated = scores_of(net)
    frozen.requires_grad_(False)
    net.second.eval()
    before = frozen.clone(), evaluated.clone()
    loss_of(net, values(4, 9)).backward()
    assert_same_bits(frozen, before[0])
    assert_same_bits(evaluated, before[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_and_step_once(reentrant: bool) -> None:
    def backward(net: nn.Module, x: Tensor) -> None:
        hidden = checkpoint(net.first, x, use_reentrant=reentrant)
        hidden = checkpoint(net.second, hidden, use_reentrant=reentrant)
        assert isinstance(hidden, Tensor)
        hidden.square().mean().backward()

    assert_as_sgd(Net(), backward)


def test_saved_tensors_that_are_copies(gradients_made: list[bool]) -> None:
    """What is stepped is the parameter, though the graph has kept a copy."""

    def backward(net: nn.Module, x: Tensor) -> None:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            loss = loss_of(net, x)
        loss.backward()

    assert_as_sgd(Net(), backward)
    assert not any(gradients_made)


@pytest.mark.parametrize("mask", MASKS)
def test_compiled_whole(mask: str, gradients_made: list[bool]) -> None:
    """One graph, whose gradients are stepped along."""
    net = Net(MASKS[mask])
    compiled: dict[int, Any] = {}

    def backward(one: nn.Module, x: Tensor) -> None:
        if one is net and not compiled:
            compiled[0] = torch.compile(one, backend="aot_eager", fullgraph=True)
        (compiled[0] if one is net else one)(x).square().mean().backward()

    assert_as_sgd(net, backward, steps=2)
    assert all(gradients_made)
    torch.compiler.reset()


def test_functional_gradients_step_nothing() -> None:
    net = Net(ThresholdMask())
    step_in_backward(net, lr=0.1)
    before = [s.clone() for s in scores_of(net)]
    torch.func.grad(lambda x: loss_of(net, x))(values(4, 9))
    given = {k: v.detach().clone() for k, v in net.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(net, p, values(4, 9)).sum())(given)
    for scores, old in zip(scores_of(net), before, strict=True):
        assert_same_bits(scores, old)


@pytest.mark.parametrize("kind", ["conv", "attention", "prepared"])
def test_other_layers_step_along_one_gradient_at_a_time(kind: str) -> None:
    torch.manual_seed(0)
    mask = GumbelMask(samples=2)
    if kind == "conv":
        layer: nn.Module = MaskedConv2d(4, 6, 3, mask=mask)
        x = values(4, 4, 5, 5)
    elif kind == "attention":
        layer, x = MaskedMultiheadAttention(8, 2, batch_first=True, mask=mask), values(4, 3, 8)
    else:
        own = GumbelMask()
        layer = nn.Sequential(MaskedConv2d(4, 4, 3, mask=own), MaskedConv2d(4, 4, 1, mask=own))
        x = values(4, 4, 5, 5)
    twin = copy.deepcopy(layer)

    def scores(one: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in one.named_parameters() if name.endswith("logits")]

    step_in_backward(layer, **SGD)
    optimizer = torch.optim.SGD(scores(twin), foreach=False, **SGD)
    for i in range(2):
        for one in (layer, twin):
            torch.manual_seed(i)
            with prepared(one if kind == "prepared" else nn.Identity()) as together:
                y = one(x, x, x)[0] if kind == "attention" else one(x)
                y.square().mean().backward()
            assert len(together) == (2 if kind == "prepared" else 0)
        optimizer.step()
        optimizer.zero_grad()
        for mine, theirs in zip(scores(layer), scores(twin), strict=True):
            assert mine.grad is None
            assert_same_bits(mine, theirs)
