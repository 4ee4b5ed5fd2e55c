"""prepared around training: masks that learn draw once for all layers, and as layers by themselves would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask import ops
from fastmask._backend import missing
from fastmask.bits import BitMask
from fastmask.masks import FixedMask, GumbelMask, ThresholdMask, TopKMask
from fastmask.nn import MaskedConv2d, MaskedLinear, prepare, prepared
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

LAST = torch.channels_last
X = values(2, 3, 6, 6)
Grads = dict[str, Tensor | None]


class Seeded(GumbelMask):
    """A mask with a seed of its own."""

    seed = 5

    def learned_options(self) -> dict[str, Any]:
        return {**super().learned_options(), "seed": self.seed}


def network() -> nn.Sequential:
    """In training: Gumbel masks of two temperatures and with a seed, top-k, threshold, a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedConv2d(3, 6, 3, padding="same", mask=GumbelMask()),
        MaskedConv2d(6, 6, 3, groups=6, mask=GumbelMask()),
        MaskedConv2d(6, 4, 1, padding=1, padding_mode="reflect", mask=TopKMask(0.5)),
        MaskedConv2d(4, 4, 2, mask=GumbelMask(tau=0.5)),
        MaskedConv2d(4, 4, 1, mask=ThresholdMask("magnitude", mu=0.1, off="flip")),
        MaskedConv2d(4, 4, 1, mask=Seeded()),
        nn.Flatten(1),
        MaskedLinear(4 * 5 * 5, 2, mask=GumbelMask()),
    )
    model[1].to(memory_format=LAST)
    model[3].weight.requires_grad_()
    with torch.no_grad():
        for i in (0, 1, 3, 5):
            model[i].mask.logits.copy_(values(*model[i].weight.shape, seed=i))
    return model


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that took a prepared weight."""
    taken, original = [], prepare.prepared_weight

    def watched(layer: nn.Module, x: Tensor) -> Tensor | None:
        found = original(layer, x)
        taken.extend([layer] if found is not None else [])
        return found

    monkeypatch.setattr("fastmask.nn.conv.prepared_weight", watched)
    return taken


def step(
    model: nn.Sequential, ready: bool, x: Tensor = X, run: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Grads]:
    """Output and gradients of one step, seeded so that layers by themselves draw what `prepared` draws.

    Seeds are those of layers 0 and 1, then of 3: the order of the calls.
    """
    model.zero_grad()
    torch.manual_seed(3)
    with prepared(model) if ready else contextlib.nullcontext():
        y = model(x) if run is None else run(model, x)
    y.float().square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_alike(got: Grads, plain: Grads, exact: Grads) -> None:
    for name, grad in got.items():
        other, true = plain[name], exact[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None and true is not None:
            assert_within_budget(grad, other, true.double())


def test_the_steps_of_layers_by_themselves(served: list[nn.Module]) -> None:
    exact = step(network().double(), False, X.double())[1]
    want, plain = step(network(), False)
    assert not served
    model = network()
    got, grads = step(model, True)
    assert served == [model[i] for i in range(6)]
    assert_same_bits(got, want)
    assert grads["3.weight"] is not None and grads["5.mask.logits"] is not None
    assert_alike(grads, plain, exact)


def test_one_call_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ops.learned_weights
    monkeypatch.setattr(
        ops, "learned_weights", lambda *a, **how: calls.append(len(a[0])) or original(*a, **how)
    )
    with prepared(network()) as names:
        assert names == ("0", "1", "2", "3", "4", "5")
    assert calls == [2, 1, 1, 1, 1], "gumbel, top-k, gumbel of another tau, threshold, its own seed"


def test_every_call_draws_and_backwards_follow_each_other(served: list[nn.Module]) -> None:
    model = network()
    results = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(4)
        with prepared(model):
            ys = []
            for _ in range(3):
                ys.append(model(X))
                ys[-1].sum().backward()
        assert served == [model[i] for i in range(6)], "the first call alone"
        served.clear()
        assert not torch.equal(ys[0], ys[1]) and not torch.equal(ys[1], ys[2])
        results.append([*ys, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one.detach(), other)


def test_seeds_in_order() -> None:
    """Of the layers with equal settings together, on the CPU as so many draws one by one."""
    model = network()
    torch.manual_seed(7)
    with prepared(model):
        ready = dict(prepare._ready.get())
    torch.manual_seed(7)
    for i in (0, 1, 3):
        layer = model[i]
        (bits,) = ops.sample_mask(layer.mask.logits, ops.draw_seed(layer.mask.logits))
        ones = ops.unpack(bits, layer.weight.shape)
        assert torch.equal(ready[layer].weight != 0, ones)


def _scores(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].mask.logits.neg_()


def _weight(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def _tau(model: nn.Sequential) -> None:
    model[0].mask.tau = 0.3


def _mu(model: nn.Sequential) -> None:
    model[4].mask.mu = 0.3


def _samples(model: nn.Sequential) -> None:
    model[0].mask.samples = 2


def _mode(model: nn.Sequential) -> None:
    model[0].mask.eval()


def _frozen(model: nn.Sequential) -> None:
    model[0].mask.logits.requires_grad_(False)


def _thawed(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_()


def _another(model: nn.Sequential) -> None:
    model[0].mask = FixedMask(BitMask.from_bool(mask(6, 3, 3, 3)))


def _seed(model: nn.Sequential) -> None:
    model[5].mask.seed = 6


CHANGES = {
    0: (_scores, _weight, _tau, _samples, _mode, _frozen, _thawed, _another), 4: (_mu,), 5: (_seed,),
}  # fmt: skip


@pytest.mark.parametrize(
    "i, change",
    [(i, change) for i, changes in CHANGES.items() for change in changes],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_no_change_is_missed(
    i: int, change: Callable[[nn.Sequential], None], served: list[nn.Module]
) -> None:
    model = network()
    with prepared(model):
        change(model)
        model(X)
    assert model[i] not in served and len(served) == 5
    got = step(model, True)[0]
    assert (model[i] in served) == (change is not _samples)
    if change in (_mode, _another, _seed, _mu):
        assert_same_bits(got, step(model, False)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_in_a_checkpoint(reentrant: bool, served: list[nn.Module]) -> None:
    def block(model: nn.Module, x: Tensor) -> Tensor:
        with prepared(model):
            return model(x)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, model, x.clone().requires_grad_(), use_reentrant=reentrant)

    want, plain = step(network(), False)
    got, grads = step(network(), False, run=run)
    assert_same_bits(got, want)
    assert_alike(grads, plain, step(network().double(), False, X.double())[1])
    assert not served


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_in_the_block_has_the_gradient_of_its_output(reentrant: bool) -> None:
    model, again = network(), network()
    with prepared(model):
        torch.manual_seed(9)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        assert x.grad is not None
        torch.manual_seed(9)
        plain = X.clone().requires_grad_()
        other = again(plain)
        other.square().sum().backward()
    assert_same_bits(y.detach(), other.detach())
    assert_same_bits(x.grad, plain.grad)  # type: ignore[arg-type]


def test_a_fixed_mask_in_checkpoints() -> None:
    """Two segments run two backwards through weights that one launch selected."""
    layers = [
        MaskedConv2d(3, 3, 3, padding=1, mask=FixedMask(BitMask.from_bool(mask(3, 3, 3, 3))))
        for _ in range(2)
    ]
    model = nn.Sequential(*layers)
    for reentrant in (False, True):
        results = []
        for ready in (False, True):
            model.zero_grad()
            x = X.clone().requires_grad_()
            with prepared(model) if ready else contextlib.nullcontext():
                y = checkpoint(layers[0], x, use_reentrant=reentrant)
                y = checkpoint(layers[1], y, use_reentrant=reentrant)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool, served: list[nn.Module]) -> None:
    """Entered in its block or around it; rounded once."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            if not inside:
                return model(x)
            with prepared(model):
                return model(x)

    exact = step(network().double(), False, X.double())[1]
    want, plain = step(
        network(), False, run=lambda m, x: torch.autocast("cpu", torch.bfloat16)(m)(x)
    )
    model = network()
    got, grads = step(model, not inside, run=run)
    assert served == [model[i] for i in range(6)]
    assert_same_bits(got, want)
    assert_alike(grads, plain, exact)


def test_half_precision_networks(served: list[nn.Module]) -> None:
    want, _ = step(network().bfloat16(), False, X.bfloat16())
    model = network().bfloat16()
    got, grads = step(model, True, X.bfloat16())
    assert len(served) == 6
    assert_same_bits(got, want)
    assert grads["0.mask.logits"] is not None and grads["0.mask.logits"].dtype == torch.float32


def test_without_gradients_and_functional_calls(served: list[nn.Module]) -> None:
    model = network()
    with torch.no_grad(), prepared(model) as names:
        assert names == ()
    other = {k: v.detach() + 1 for k, v in model.named_parameters()}
    torch.manual_seed(1)
    want = torch.func.functional_call(model, other, (X,))
    with prepared(model):
        torch.manual_seed(1)
        assert_same_bits(torch.func.functional_call(model, other, (X,)), want)
        assert not served
        with torch.no_grad():
            model(X)
        model(X)
    assert not served, "a call spends what was drawn for it"


def test_a_layer_that_is_not_called_has_no_gradient() -> None:
    model = network()
    with prepared(model):
        model[1](model[0](X)).sum().backward()
    assert model[0].mask.logits.grad is not None and model[1].mask.logits.grad is not None
    assert all(next(model[i].mask.parameters()).grad is None for i in (2, 3, 4, 5))


def test_samples_and_scales_work_by_themselves() -> None:
    model = nn.Sequential(
        MaskedConv2d(3, 4, 1, mask=GumbelMask(samples=2)),
        MaskedConv2d(4, 4, 1, mask=ThresholdMask(scale="rsqrt_density")),
    )
    with prepared(model) as names:
        assert names == ()
        model(X).sum().backward()
    model.eval()
    with prepared(model) as names:
        assert names == ("0",)


@pytest.mark.skipif(missing("cpu") is not None, reason=f"no CPU engine: {missing('cpu')}")
def test_gradients_in_the_formats_of_their_tensors() -> None:
    model = network().to(memory_format=LAST)
    _, grads = step(model, True)
    for name, p in model.named_parameters():
        if (grad := grads[name]) is not None:
            assert grad.stride() == p.stride(), name
