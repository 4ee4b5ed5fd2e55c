"""prepared: the results of layers that select by themselves, and never a stale weight."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmask
from fastmask import ops
from fastmask.bits import BitMask
from fastmask.masks import FixedMask, GumbelMask, ThresholdMask, TopKMask
from fastmask.nn import MaskedConv2d, MaskedLinear, prepare, prepared
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values


def network() -> nn.Sequential:
    """Fixed, threshold, top-k and Gumbel masks, a depthwise layer in channels_last, a linear one."""
    torch.manual_seed(0)
    fixed = FixedMask(BitMask.from_bool(mask(6, 3, 3, 3)))
    model = nn.Sequential(
        MaskedConv2d(3, 6, 3, padding="same", mask=fixed),
        MaskedConv2d(6, 6, 3, groups=6, mask=ThresholdMask("magnitude", mu=0.1)),
        MaskedConv2d(6, 4, 1, padding=1, padding_mode="reflect", mask=TopKMask(0.5)),
        MaskedConv2d(4, 4, 2, mask=GumbelMask()),
        MaskedConv2d(4, 4, 1, mask=TopKMask(0.5, off="flip")),
        nn.Flatten(1),
        MaskedLinear(4 * 5 * 5, 2, mask=GumbelMask()),
    ).eval()
    model[1].to(memory_format=torch.channels_last)
    with torch.no_grad():
        model[3].mask.logits.copy_(values(4, 4, 2, 2))
    return model


X = values(2, 3, 6, 6)


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that took a prepared weight."""
    taken, original = [], prepare.prepared_weight

    def watched(layer: nn.Module, x: Tensor) -> Tensor | None:
        found = original(layer, x)
        taken.extend([layer] if found is not None else [])
        return found

    monkeypatch.setattr("fastmask.nn.conv.prepared_weight", watched)
    return taken


def test_the_results_of_layers_that_select_by_themselves(convolved: list[nn.Module]) -> None:
    model = network()
    with torch.no_grad():
        want = model(X)
        assert not convolved
        with prepared(model) as names:
            got = [model(X), model(X)]
        assert names == ("0", "1", "2", "3")
        assert convolved == [model[i] for i in range(4)] * 2
        assert_same_bits(model(X), want)
    assert len(convolved) == 8 and prepare._ready.get() == {}
    for y in got:
        assert_same_bits(y, want)


def test_one_call_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ops.masked_weights
    monkeypatch.setattr(ops, "masked_weights", lambda *a: calls.append(len(a[0])) or original(*a))
    model = network()
    model[3].double()
    with prepared(model):
        pass
    assert calls == [3, 1], "one for each dtype"


def test_training_gives_the_same_gradients_and_learned_masks_learn(
    convolved: list[nn.Module],
) -> None:
    results = []
    for dtype, ready in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model, x = network().to(dtype), X.to(dtype)
        model[0].train()
        model[3].mask.train()
        torch.manual_seed(3)
        if ready:
            with prepared(model) as names:
                model(x).square().sum().backward()
            assert names == ("0", "1", "2", "3") and convolved == [model[i] for i in range(4)]
        else:
            model(x).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert grads["0.weight"] is not None and grads["3.mask.logits"] is not None
        results.append(grads)
    exact, plain, ours = results
    for name, grad in ours.items():
        assert (plain[name] is None) == (grad is None), name
        if grad is not None:
            assert_within_budget(grad, plain[name], exact[name].double())


def _step(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.add_(1.0)


def _state_dict(model: nn.Sequential) -> None:
    state = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def _other_bits(model: nn.Sequential) -> None:
    model[0].mask.bits.copy_(BitMask.from_bool(mask(6, 3, 3, 3, seed=9)).bits)


def _replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def _data(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.detach() + 1


def _another_mask(model: nn.Sequential) -> None:
    model[0].mask = FixedMask(~model[0].mask.active())


def _setting(model: nn.Sequential) -> None:
    model[1].mask.mu = 0.3


def _density(model: nn.Sequential) -> None:
    model[2].mask.target_density = 0.25


def _scores(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[3].mask.logits.neg_()


def _rounded(model: nn.Sequential) -> None:
    model.bfloat16().float()


def _optimizer(model: nn.Sequential) -> None:
    model[0].weight.grad = torch.ones_like(model[0].weight)
    fastmask.optim.MaskedSGD({model[0].weight: None}, lr=0.5).step()


CHANGES: list[Callable[[nn.Sequential], None]] = [
    _step, _state_dict, _other_bits, _replaced, _data, _another_mask, _setting, _density, _scores, _rounded,
    _optimizer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_is_missed(change: Callable[[nn.Sequential], None]) -> None:
    model = network()
    with torch.no_grad(), prepared(model):
        before = model(X)
        with torch.enable_grad():
            change(model)
        got = model(X)
    with torch.no_grad():
        want = model(X)
    assert not torch.equal(before, want)
    assert_same_bits(got, want)


def test_training_begun_in_the_block_reaches_scores_and_weights() -> None:
    model = network()
    with torch.no_grad(), prepared(model):
        model(X)
        model.train()
        with torch.enable_grad():
            model(X).sum().backward()
    for i in range(5):
        weight, scores = model[i].weight, next(model[i].mask.parameters(), None)
        assert (weight if scores is None else scores).grad is not None, i


def test_autocast(convolved: list[nn.Module]) -> None:
    """Rounded once: to the dtype of the block it runs in."""
    model = network()

    def run(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return model(X)

    kinds = (torch.bfloat16, None, torch.float16)
    with torch.no_grad():
        want = [run(kind) for kind in kinds]
        for entered, taken in ((torch.bfloat16, 4), (None, 12)):
            convolved.clear()
            with torch.autocast("cpu", entered, enabled=entered is not None):
                block = prepared(model)
                block.__enter__()
            got = [run(kind) for kind in kinds]
            block.__exit__(None, None, None)
            for one, other in zip(got, want, strict=True):
                assert_same_bits(one, other)
            assert len(convolved) == taken


def test_threads_copies_blocks_in_blocks_and_errors(convolved: list[nn.Module]) -> None:
    model, other, results = network(), network(), []
    with torch.no_grad():
        want = model(X)
        with contextlib.suppress(ZeroDivisionError), prepared(model), prepared(other):
            thread = threading.Thread(target=lambda: results.append(model(X)))
            thread.start()
            thread.join()
            assert not convolved, "another thread selects by itself"
            results += [copy.deepcopy(model)(X), model(X), other(X)]
            assert len(convolved) == 8
            raise ZeroDivisionError
        assert prepare._ready.get() == {}
    for y in results:
        assert_same_bits(y.detach(), want)


def test_compiled_code_functional_calls_and_inference_mode() -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    weights = {k: v + 1 for k, v in model.named_parameters()}
    with torch.no_grad():
        want, moved = model(X), torch.func.functional_call(model, weights, (X,))
        with prepared(model):
            assert_same_bits(compiled(X), want)
            assert_same_bits(torch.func.functional_call(model, weights, (X,)), moved)
    with torch.inference_mode(), prepared(model) as names:
        assert len(names) == 4
        assert torch.equal(model(X), want)
    with torch.inference_mode():
        made = network()
        with prepared(made) as names:
            assert names == (), "their writes are not counted"
            assert torch.equal(made(X), want)


def test_what_it_refuses_and_leaves_alone() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        prepared([]).__enter__()  # type: ignore[arg-type]
    with prepared(nn.Conv2d(3, 3, 1)) as names:
        assert names == ()


def test_an_untouched_network_pays_no_version_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(prepare, "_origin", fails)
    network()(X)
