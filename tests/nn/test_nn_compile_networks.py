"""Converted networks under torch.compile and torch.export: one graph, the same numbers, nothing changed."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import fastmask
from fastmask import BitMask, FixedMask, GumbelMask, ThresholdMask
from fastmask.nn import (
    batch_norm_state_dict,
    load_batch_norm_state_dict,
    set_batch_norm_policy,
)
from fastmask.nn.attention import projections
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

STEPS = 4


def resnet18() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="this ResNet-18 is torchvision's")
    return models.resnet18(weights=None, num_classes=10)


def vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="this ViT is timm's")
    # Three of its twelve blocks: they are alike, and so are their graphs.
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=3)


def vit_of_torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="this ViT is torchvision's")
    model = models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # It starts at zero, which would hide all before it.
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "vit": vit,
    "torchvision vit": vit_of_torchvision,
}
every = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def fix(model: nn.Module) -> None:
    """Give each layer fixed bits of its shape, three quarters of them ones."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.MultiheadAttention:
            fixed = {
                key: fixed_bits(getattr(owner, parameter))
                for key, (owner, parameter) in projections(layer).items()
            }
            fastmask.mask_(layer, fixed)
        elif isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith("out_proj"):
            fastmask.mask_(layer, fixed_bits(layer.weight))


def fixed_bits(weight: Tensor) -> FixedMask:
    return FixedMask(BitMask.from_bool(mask(*weight.shape, density=0.75)))


class Compiled:
    """A module compiled as one graph, and what dynamo counted meanwhile."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
        self.run = torch.compile(model, fullgraph=True, backend=self.graphs)

    def assert_one_graph(self) -> None:
        counted = torch._dynamo.utils.counters
        assert self.graphs.frame_count == counted["stats"]["unique_graphs"] == 1
        assert not counted["graph_break"] and not counted["recompiles"]


@pytest.fixture(autouse=True)
def no_graphs_are_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def images(seed: int) -> Tensor:
    return values(2, 3, 32, 32, seed=seed)


def step(run: Callable[[Tensor], Tensor], model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    y = run(images(seed))
    y.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **found, **dict(model.named_buffers())}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit: aot_eager calls the kernels that eager calls, in its order."""
    assert a.keys() == b.keys()
    for key in a:
        assert_same_bits(a[key], b[key])


@every
def test_training_is_one_graph_whatever_the_seed(name: str) -> None:
    model = made(name)
    fastmask.mask_(model, GumbelMask(), lambda name, _: not name.startswith("layer4"))
    if hasattr(model, "layer4"):  # Three quarters of ResNet-18's weights: sampling them takes long.
        fastmask.mask_(model.layer4, ThresholdMask("kaiming"))
    set_batch_norm_policy(model, "frozen")
    compiled = Compiled(model, "aot_eager")
    outputs = []
    for seed in range(STEPS):
        found = step(compiled.run, model, seed)
        outputs.append(found["output"])
        if seed in (0, STEPS - 1):
            assert_same(step(model, model, seed), found)
    compiled.assert_one_graph()
    scores = {name: p for name, p in model.named_parameters() if ".mask." in name}
    assert scores and all(p.grad is not None for p in scores.values())
    torch.manual_seed(-1)
    again = compiled.run(images(0))
    assert not torch.equal(again, outputs[0]), "another seed gives another mask in the same graph"


@every
def test_switching_masks_compiles_nothing_new(name: str) -> None:
    model = made(name)
    fix(model)
    set_batch_norm_policy(model, "frozen")
    compiled = Compiled(model, "aot_eager")
    masks = [m for m in model.modules() if isinstance(m, FixedMask)]
    outputs = []
    for seed in range(STEPS):
        for own in masks:
            bits = BitMask.from_bool(mask(*own.shape, seed=seed, density=0.75)).bits
            if seed % 2:
                own.bits.copy_(bits)
            else:
                own.load_state_dict({"bits": bits})
        eager, other = step(model, model, 0), step(compiled.run, model, 0)
        assert_same(eager, other)
        outputs.append(other["output"])
    compiled.assert_one_graph()
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == STEPS


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 5)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_inductor_computes_what_eager_does() -> None:
    model = small()
    fastmask.mask_(model, GumbelMask(samples=2))
    set_batch_norm_policy(model, "affine")
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for own in [m for m in exact.modules() if isinstance(m, GumbelMask)]:
        own.logits.data = own.logits.data.double()  # The same bits, gradients of float64.
    compiled = Compiled(twin, "inductor")
    for seed in range(2):
        eager, other = (step(run, m, seed) for run, m in ((model, model), (compiled.run, twin)))
        wide = step(lambda x: exact(x.double()), exact, seed)
        # Kernels of another order of sums: the error budget of every op.
        for key, want in eager.items():
            if want.is_floating_point():
                assert_within_budget(other[key], want, wide[key])
    compiled.assert_one_graph()


@every
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_export_computes_the_same_and_leaves_the_live_model(name: str, kind: str) -> None:
    model, x = made(name), images(0)
    if kind == "fixed":
        fix(model)
    else:
        fastmask.mask_(model, ThresholdMask("kaiming", off="flip"))
    set_batch_norm_policy(model)
    model.eval()
    expected = model(x).detach()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = [*model.parameters(), *model.buffers()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    program = torch.export.export(model, (x,))
    assert_same_bits(program.module()(x).detach(), expected)
    other = images(1)
    assert_same_bits(program.module()(other).detach(), model(other).detach())
    assert program.state_dict.keys() == state.keys()
    assert all(
        a is b for a, b in zip([*model.parameters(), *model.buffers()], objects, strict=True)
    )
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    for key, tensor in model.state_dict().items():
        assert_same_bits(tensor, state[key])
    assert_same_bits(model(x).detach(), expected)


@pytest.mark.parametrize("policy", ["frozen", "affine", "per_task"])
def test_norms_keep_to_their_policy_in_one_graph(policy: Any) -> None:
    model = small()
    fastmask.mask_(model, GumbelMask())
    set_batch_norm_policy(model, policy)
    twin = copy.deepcopy(model)
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    compiled = Compiled(twin, "aot_eager")
    for seed in range(STEPS):  # Each step calls model.train().
        assert_same(step(model, model, seed), step(compiled.run, twin, seed))
    compiled.assert_one_graph()
    moved = {key for key, t in twin.named_buffers() if not torch.equal(t, before[key])}
    assert moved == (set(before) if policy == "per_task" else set())
    assert (twin[1].weight.grad is None) == (policy == "frozen")


def test_norms_of_another_task_compile_nothing_new() -> None:
    model = small()
    fastmask.mask_(model, ThresholdMask("kaiming"))
    set_batch_norm_policy(model, "per_task")
    tasks = []
    for seed in range(2):
        step(model, model, seed)
        tasks.append(batch_norm_state_dict(model))
    model.eval()
    compiled = Compiled(model, "aot_eager")
    outputs = []
    for task in (*tasks, tasks[0]):
        load_batch_norm_state_dict(model, task)
        outputs.append(compiled.run(images(0)).detach())
        assert_same_bits(outputs[-1], model(images(0)).detach())
    compiled.assert_one_graph()
    assert not torch.equal(outputs[0], outputs[1])
    assert_same_bits(outputs[0], outputs[2])
