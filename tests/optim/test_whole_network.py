"""Every parameter of a ResNet-18 partly frozen at once: 50 steps, mixed precision, skipped steps, buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmask import BitMask
from fastmask.nn import set_batch_norm_policy
from fastmask.optim import MaskedAdamW, MaskedSGD, protect, verify_frozen
from fastmask.testing import as_integers, assert_same_bits, generator, mask, values

Build = Callable[[list[nn.Parameter], dict[Any, BitMask]], torch.optim.Optimizer]
BATCHES = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only wait, and these tests are many steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resnet(width: int) -> nn.Module:
    """torchvision's ResNet-18 for 3 classes, each of its 62 parameters, channels by `width` / 64."""
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.resnet18(num_classes=3)
        for name, module in list(model.named_modules()):
            new: nn.Module | None = None
            if isinstance(module, nn.Conv2d):
                size, step, pad = module.kernel_size[0], module.stride[0], module.padding[0]
                narrow = 3 if module.in_channels == 3 else module.in_channels * width // 64
                wide = module.out_channels * width // 64
                new = nn.Conv2d(narrow, wide, size, step, pad, bias=False)
            elif isinstance(module, nn.BatchNorm2d):
                new = nn.BatchNorm2d(module.num_features * width // 64)
            elif isinstance(module, nn.Linear):
                new = nn.Linear(module.in_features * width // 64, module.out_features)
            if new is not None and width != 64:
                model.set_submodule(name, new)
    assert len(list(model.parameters())) == 62
    return model


class Training:
    """A network with a random mask for every parameter, pictures to fit, and steps over them."""

    def __init__(self, build: Build, width: int = 8, size: int = 32, density: float = 0.5) -> None:
        self.model = resnet(width)
        self.x = values(BATCHES, 2, 3, size, size)
        self.y = torch.randint(3, (BATCHES, 2), generator=generator(1))
        with torch.no_grad():  # Statistics of the pictures, for those who then hold them.
            for i in range(20):
                self.model(self.x[i % BATCHES])
        self.params = list(self.model.parameters())
        self.frozen = {
            p: BitMask.from_bool(mask(*p.shape, density=density, seed=i))
            for i, p in enumerate(self.params)
        }
        self.optimizer = build(self.params, self.frozen)
        self.start = copy.deepcopy(self.model)

    def backward(
        self, step: int, dtype: torch.dtype, scale: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> None:
        self.optimizer.zero_grad()
        i = step % BATCHES
        with torch.amp.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(self.model(self.x[i]).float(), self.y[i])
        scale(loss).backward()

    def assert_frozen_held_and_free_moved(self) -> None:
        verify_frozen(self.start, self.model, self.frozen)
        moved = total = 0
        for param, before in zip(self.params, self.start.parameters(), strict=True):
            bits = self.frozen[param].to_bool()
            assert_same_bits(param, before, where=bits)
            assert param.isfinite().all()
            changed = (as_integers(param) != as_integers(before))[~bits]
            if param.requires_grad and changed.numel():
                assert changed.any()
                moved, total = moved + int(changed.sum()), total + changed.numel()
        assert moved > 0.95 * total


def warm_then_protect(cls: Any, **options: Any) -> Build:
    """An optimizer with ten steps of state behind it at every entry, then protected."""

    def build(params: list[nn.Parameter], frozen: dict[Any, BitMask]) -> torch.optim.Optimizer:
        optimizer = cls(params, **options)
        for step in range(10):
            for i, param in enumerate(params):
                param.grad = 0.01 * values(*param.shape, seed=100 * step + i)
            optimizer.step()
        protect(optimizer, frozen)
        return optimizer

    return build


def masked(cls: Any, **options: Any) -> Build:
    return lambda params, frozen: cls(params, frozen=frozen, **options)


SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
BUILDS: dict[str, Build] = {
    "protect-SGD": warm_then_protect(torch.optim.SGD, **SGD),
    "protect-AdamW": warm_then_protect(torch.optim.AdamW, **ADAMW),
    "protect-NAdam": warm_then_protect(torch.optim.NAdam, **ADAMW, decoupled_weight_decay=True),
    "MaskedSGD": masked(MaskedSGD, **SGD),
    "MaskedSGD-compact": masked(MaskedSGD, **SGD, compact=True),
    "MaskedAdamW": masked(MaskedAdamW, **ADAMW),
    "MaskedAdamW-compact": masked(MaskedAdamW, **ADAMW, compact=True),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


@every_build
def test_fifty_steps_in_bfloat16(build: Build) -> None:
    training = Training(build)
    for step in range(50):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    training.assert_frozen_held_and_free_moved()


@pytest.mark.parametrize(
    "kind", ["protect-SGD", "protect-AdamW", "MaskedSGD", "MaskedAdamW-compact"]
)
def test_fifty_steps_in_float16_some_of_them_skipped(kind: str) -> None:
    # At 32 the last norms would have two values a channel, and float16 overflows of itself.
    training = Training(BUILDS[kind], size=64)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(50):
        training.backward(step, torch.float16, scaler.scale)
        spoiled = step % 10 == 3
        if spoiled:
            # At a free entry: protect has cleared the others, and what it clears is not looked at.
            param = training.params[step]
            free = (~training.frozen[param].to_bool()).flatten().nonzero()[0]
            assert param.grad is not None
            param.grad.view(-1)[free] = torch.inf
        before = [param.detach().clone() for param in training.params]
        scaler.step(training.optimizer)
        scaler.update()
        assert all(map(torch.equal, training.params, before)) == spoiled
    assert scaler.get_scale() == 2.0**3
    training.assert_frozen_held_and_free_moved()


def test_fifty_steps_at_full_width() -> None:
    training = Training(BUILDS["MaskedAdamW-compact"], width=64, density=0.9)
    for step in range(50):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    training.assert_frozen_held_and_free_moved()
    state = training.optimizer.state
    held = sum(state[p]["exp_avg"].untyped_storage().nbytes() for p in training.params)
    free = sum(bits.numel() - bits.count() for bits in training.frozen.values())
    assert sum(p.numel() for p in training.params) > 11_000_000
    assert held == 4 * free < 0.11 * sum(p.nbytes for p in training.params)


def test_without_protection_the_same_run_moves_every_parameter() -> None:
    training = Training(lambda params, frozen: torch.optim.AdamW(params, **ADAMW))
    for step in range(3):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    for param, before in zip(training.params, training.start.parameters(), strict=True):
        assert (param != before)[training.frozen[param].to_bool()].any()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("policy", ["frozen", "affine"])
@pytest.mark.parametrize("kind", ["protect-AdamW", "MaskedSGD", "MaskedAdamW-compact"])
def test_buffers_keep_their_bits_under_the_policies_that_hold_them(kind: str, policy: Any) -> None:
    training = Training(BUILDS[kind])
    set_batch_norm_policy(training.model, policy)
    training.model.train()
    before = buffers(training.model)
    assert len(before) == 60
    for step in range(10):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    for name, buffer in training.model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    training.assert_frozen_held_and_free_moved()


def test_an_all_frozen_network_still_learns_statistics_unless_held() -> None:
    training = Training(BUILDS["MaskedSGD"], density=1.1)
    before = buffers(training.model)
    for step in range(3):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    for param, start in zip(training.params, training.start.parameters(), strict=True):
        assert_same_bits(param, start)
    assert all(
        not torch.equal(buffer, before[name]) for name, buffer in training.model.named_buffers()
    )
    set_batch_norm_policy(training.model, "frozen")
    training.model.train()
    before, outputs = buffers(training.model), training.model(training.x[0])
    for step in range(3):
        training.backward(step, torch.bfloat16)
        training.optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in training.model.named_buffers())
    assert_same_bits(training.model(training.x[0]), outputs)
