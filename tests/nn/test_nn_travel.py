"""Converted networks on their way: recomputed, averaged, cast, emptied, copied, sent to other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastmask
from fastmask import BitMask, FixedMask, GumbelMask, ThresholdMask, TopKMask
from fastmask.masks import Mask
from fastmask.nn import set_batch_norm_policy
from fastmask.testing import assert_same_bits, mask, values

MASKS: dict[str, Callable[[], Mask]] = {
    "gumbel": lambda: GumbelMask(init=0.5, samples=2),
    "threshold": lambda: ThresholdMask("kaiming", scale="rsqrt_density"),
    "topk": lambda: TopKMask(0.5, "flip"),
}
every = pytest.mark.parametrize("kind", [*MASKS, "fixed"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.GELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.GELU()),
        nn.Linear(6, 5),
    )


def converted(kind: str) -> nn.Sequential:
    model = net()
    if kind == "fixed":
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
            fastmask.mask_(layer, FixedMask(BitMask.from_bool(mask(*layer.weight.shape))))
    else:
        fastmask.mask_(model, MASKS[kind]())
    set_batch_norm_policy(model, "affine")
    return model


def images() -> Tensor:
    return values(4, 3, 4, 4)


def seeded(run: Callable[[Tensor], Tensor], x: Tensor, seed: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return run(x)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    # A reentrant checkpoint gives no gradient where no input asks for one.
    seeded(run, images().requires_grad_()).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recomputed(nn.Module):
    """Each part of a network recomputed in the backward."""

    def __init__(self, model: nn.Sequential, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        for part in self.model:
            x = checkpoint(part, x, **self.options)
        return x


@every
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_what_is_recomputed_draws_the_same_noise(kind: str, reentrant: bool, low: bool) -> None:
    model = converted(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        plain = gradients(model, model)
        again = gradients(Recomputed(model, use_reentrant=reentrant), model)
    assert plain.keys() == again.keys() and "0.0.bias" in plain
    for name, want in plain.items():
        assert want.dtype == torch.float32
        assert_same_bits(again[name], want)


def test_recomputed_in_a_compiled_graph_it_draws_the_same_noise() -> None:
    model = converted("gumbel")
    run = Recomputed(model, use_reentrant=False)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        results = []
        for each in (model, compiled):
            model.zero_grad()
            seeded(each, images(), seed).square().sum().backward()
            results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for want, got in zip(*results, strict=True):
            assert_same_bits(got, want)


@every
def test_averages_hold_scores_and_take_bits_and_statistics_as_they_are(kind: str) -> None:
    model = converted(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(values(*parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("bits"):
                buffer.zero_()
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        want = torch.lerp(first[name], model.get_parameter(name).detach(), 1 - 0.75)
        assert_same_bits(p.detach(), want)
        assert p.requires_grad == model.get_parameter(name).requires_grad
    for name, buffer in average.module.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))
    average.train()
    assert not average.module[0][1].training, "the batch-norm policy holds in the average too"


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_scores_and_bits_alone(kind: str, dtype: torch.dtype) -> None:
    model = converted(kind)
    bits = [m.active() for m in model.modules() if isinstance(m, Mask)]
    model.to(dtype)
    masks = [m for m in model.modules() if isinstance(m, Mask)]
    assert [m.active() for m in masks] == bits
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".mask." in name else dtype)
    y = model(images().to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    y.sum().backward()
    for own in masks:
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own.parameters())


@every
def test_emptied_and_filled_again(kind: str) -> None:
    model = converted(kind)
    expected, state = model.eval()(images()).detach(), copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    emptied = model.to("meta")
    assert all(t.is_meta for t in [*emptied.parameters(), *emptied.buffers()])
    assert emptied(images().to("meta")).shape == expected.shape
    repr(emptied)
    emptied.load_state_dict(state, assign=True)
    assert [p.requires_grad for p in emptied.parameters()] == flags
    assert_same_bits(emptied(images()).detach(), expected)


def test_a_network_without_memory_is_converted_and_filled() -> None:
    model = converted("threshold")
    with torch.device("meta"):
        later = net()
    fastmask.mask_(later, MASKS["threshold"]())
    later.load_state_dict(model.state_dict(), assign=True)
    assert_same_bits(later.eval()(images()).detach(), model.eval()(images()).detach())
    fastmask.unmask_(later)
    assert [type(m) for m in later.modules()] == [type(m) for m in net().modules()]


def test_copies_of_tied_weights_are_tied_too() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    fastmask.mask_(model, GumbelMask())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        assert other["head"].weight is other["embed"].weight
        assert not other["head"].weight.requires_grad


def run_elsewhere(model: nn.Module, x: Tensor) -> tuple[Tensor, bool, bool]:
    """In a process of its own: an output, and the modes of the network and of a norm after train()."""
    torch.set_num_threads(1)
    y = seeded(model.train(), x).detach()
    return y, model.training, model[0][1].training


def test_sent_to_a_spawned_process_it_computes_the_same() -> None:
    # Sums of a convolution may depend on the number of threads.
    threads = torch.get_num_threads()
    models = [converted(kind) for kind in [*MASKS, "fixed"]]
    context = multiprocessing.get_context("spawn")
    torch.set_num_threads(1)
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            sent = [pool.submit(run_elsewhere, model, images()) for model in models]
            for model, future in zip(models, sent, strict=True):
                y, training, held = future.result(timeout=120)
                assert training and not held
                assert_same_bits(y, seeded(model, images()).detach())
    finally:
        torch.set_num_threads(threads)


@every
def test_in_a_data_parallel_wrapper(kind: str) -> None:
    model = converted(kind)
    plain = gradients(model, model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        again = gradients(wrapped, model)
    finally:
        dist.destroy_process_group()
    assert plain.keys() == again.keys()
    for name, want in plain.items():
        assert_same_bits(again[name], want)
