"""The same bits on every device, tensors whose offsets need 64 bits, CUDA graphs, other streams.

Where there is no GPU, what can be is held between the CPU engine and the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import _backend, ops
from fastmask.ops.sample_mask import reference as sampling
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    as_integers,
    assert_same_bits,
    assert_within_budget,
    mask,
    values,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROOMS = Path(_backend.__file__).parent / "ops"
SEED = 2**63 + 12345
# Above 2^31 elements on a GPU; half a gigabyte of bits and some for what ops make besides must be free.
FEW, MANY = 2**16 + 4096, 2**31 + 4096
# One after the other, in one process: together they would not fit.
large = pytest.mark.xdist_group("large")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def back_ends(*names: str) -> list[Any]:
    """Each compiled back end that these ops have on the device."""
    found = [
        (op, b)
        for op in names
        for b in _backend.preference(DEVICE.type)
        if b != "reference" and (ROOMS / op / f"{b}.py").exists() and _backend.missing(b) is None
    ]
    return found or [pytest.param("", "", marks=pytest.mark.skip("no compiled back end"))]


def moved(inputs: Any, device: torch.device) -> Any:
    """Copies on a device of tensors in lists."""
    if isinstance(inputs, Tensor):
        return inputs.detach().to(device, copy=True)
    return [moved(each, device) for each in inputs]


def made_bits(op: str) -> list[tuple[list[Any], Callable[..., Any]]]:
    """Inputs and calls of an op whose results are integers, or selected and not computed."""
    cases: list[tuple[list[Any], Callable[..., Any]]] = []
    for shape in (*ADVERSARIAL_SHAPES, (4097,), (2, 33, 5)):
        m, v = mask(*shape), values(*shape)
        packed = ops.pack(m)
        if op == "pack":
            cases += [([m], lambda m, b: ops.pack(m, backend=b))]
            cases += [([v], lambda v, b: ops.pack(v, 0.25, backend=b))]
        elif op == "unpack":
            cases += [([packed], lambda t, b, shape=shape: ops.unpack(t, shape, backend=b))]
        elif op == "popcount":
            cases += [([packed], lambda t, b: ops.popcount(t, backend=b))]
        elif op == "sample_mask":
            cases += [([3 * v], lambda v, b: ops.sample_mask(v, SEED, 3, 7, backend=b))]
        elif op == "topk_mask":
            ties = (v * 2).round()
            for share in (0.0, 0.3, 1.0):
                cases += [
                    ([t], lambda t, b, d=share: ops.topk_mask(t, d, backend=b)) for t in (v, ties)
                ]
        elif op == "restore_frozen_":
            cases += [([[v], [values(*shape, seed=1)], [packed]], restored)]
    return cases


def restored(params: list[Tensor], saved: list[Tensor], bits: list[Tensor], backend: str) -> Tensor:
    ops.restore_frozen_(params, saved, bits, backend=backend)
    return params[0]


@pytest.mark.parametrize(
    "op, backend",
    back_ends("pack", "unpack", "popcount", "sample_mask", "topk_mask", "restore_frozen_"),
)
def test_bits_are_those_of_the_reference_on_the_cpu(op: str, backend: str) -> None:
    cases = made_bits(op)
    assert cases
    for inputs, call in cases:
        want = call(*moved(inputs, torch.device("cpu")), "reference")
        assert_same_bits(call(*moved(inputs, DEVICE), backend).cpu(), want)


@pytest.mark.parametrize("op, backend", back_ends("learned_linear", "learned_weight"))
@pytest.mark.parametrize("shape", ADVERSARIAL_SHAPES, ids=str)
def test_learned_bits_are_those_of_the_reference_on_the_cpu(
    shape: tuple[int, int], op: str, backend: str
) -> None:
    """A weight of ones shows the bits: each output is 0 or 1, exactly."""
    n, k = shape
    scores = 2 * values(n, k)
    want = ops.unpack(ops.sample_mask(scores, SEED, 2, backend="reference"), (n, k)).float()
    ones, logits = torch.ones(n, k, device=DEVICE), scores.to(DEVICE)
    options: Any = {"seed": SEED, "samples": 2, "backend": backend}
    if op == "learned_weight":
        got = ops.learned_weight(ones, logits, **options)
    else:
        eye = torch.eye(k, device=DEVICE).repeat(2, 1)
        got = ops.learned_linear(eye, ones, logits, **options).view(2, k, n).mT
    assert torch.equal(got.cpu(), want)


EVERY = [
    (op.name, b)
    for op in sorted(ROOMS.iterdir())
    for b in _backend.preference(DEVICE.type)
    if (op / f"{b}.py").exists() and _backend.missing(b) is None
]


@pytest.mark.parametrize("op, backend", EVERY)
def test_the_default_device_does_not_matter(op: str, backend: str) -> None:
    """What an op makes beside its results lies where its tensors do, numbers on the CPU."""
    w, g = values(8, 16).to(DEVICE), values(8, 16, seed=1).to(DEVICE)
    x, images = values(6, 16, seed=2).to(DEVICE), values(2, 4, 5, 5).to(DEVICE)
    kernel = values(3, 4, 3, 3, seed=3).to(DEVICE)
    bits, held = ops.pack(mask(8, 16).to(DEVICE)), ops.pack(mask(3, 4, 3, 3).to(DEVICE))
    kept, at = ops.compress(w, bits), {"backend": backend}

    def stepped(step: Callable[..., None], *states: Any, **options: Any) -> list[Tensor]:
        copies = [None if one is None else [one.clone()] for one in states]
        step([theta := w.clone()], [g], *copies, [bits], lr=0.1, **options, **at)
        return [theta, *(one[0] for one in copies if one)]

    def taught(*states: Tensor) -> tuple[Tensor, ...]:
        options: Any = {"lr": 0.1, "momentum": 0.9, "scale": "rsqrt_density", "seed": 3, **at}
        ops.learned_linear_step_(x[:, :8].contiguous(), x, w, states[0], bits, states[1], **options)
        return states

    call: Callable[[], Any] = {
        "pack": lambda: ops.pack(w, 0.1, **at),
        "unpack": lambda: ops.unpack(bits, (8, 16), **at),
        "popcount": lambda: [ops.popcount(bits, **at)],
        "sample_mask": lambda: ops.sample_mask(w, SEED, 2, **at),
        "topk_mask": lambda: ops.topk_mask(w, 0.3, **at),
        "restore_frozen_": lambda: restored([w.clone()], [g], [bits], backend),
        "masked_sgd_": lambda: stepped(ops.masked_sgd_, g, momentum=0.9),
        "masked_adamw_": lambda: stepped(ops.masked_adamw_, g, g.abs(), None, torch.ones((), device=DEVICE)),
        "masked_linear": lambda: ops.masked_linear(x, w, bits, **at),
        "compressed_linear": lambda: ops.compressed_linear(x, kept, bits, 8, **at),
        "masked_conv2d": lambda: ops.masked_conv2d(images, kernel, held, **at),
        "masked_weights": lambda: ops.masked_weights([w, g], [bits, bits], **at),
        "learned_linear": lambda: ops.learned_linear(x, w, g, seed=3, samples=2, **at),
        "learned_linear_step_": lambda: taught(g.clone(), torch.zeros_like(g)),
        "learned_weights": lambda: ops.learned_weights([w, g], [g, w], seeds=[3, 4], **at),
        "learned_weight": lambda: ops.learned_weight(w, g, seed=3, scale="rsqrt_density", **at),
        "learned_conv2d": lambda: ops.learned_conv2d(images, kernel, kernel, seed=3, **at),
    }[op]  # fmt: skip
    want = call()
    with torch.device("meta"):
        got = call()
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def room_for(count: int, bytes_each: float) -> None:
    """Skip where a GPU has less free memory than that."""
    if count == FEW:
        return
    if not ON_GPU:
        pytest.skip("needs a CUDA device")
    torch.cuda.empty_cache()  # what tests before this one let go of
    free = torch.cuda.mem_get_info()[0]
    if free < count * bytes_each * 1.2:
        pytest.skip(
            f"needs {count * bytes_each * 1.2 / 2**30:.0f} GiB of memory, {free >> 30} are free"
        )


@large
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("op, backend", back_ends("pack", "unpack", "popcount"))
def test_bits_behind_many_elements(op: str, backend: str, count: int) -> None:
    """The last elements are as if they were alone."""
    room_for(count, 2.3)
    m = torch.zeros(count, dtype=torch.bool, device=DEVICE)
    end = mask(4096).to(DEVICE)
    m[-4096:] = end
    bits = torch.zeros(count // 8, dtype=torch.uint8, device=DEVICE)
    bits[-512:] = ops.pack(end, backend="reference")
    if op == "pack":
        assert torch.equal(ops.pack(m, backend=backend), bits)
    elif op == "unpack":
        assert torch.equal(ops.unpack(bits, (count,), backend=backend), m)
    else:
        assert ops.popcount(bits, backend=backend) == end.sum()


@large
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("op, backend", back_ends("sample_mask"))
def test_samples_behind_many_elements(op: str, backend: str, count: int) -> None:
    room_for(count, 4.5)
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    logits = torch.zeros(count, dtype=dtype, device=DEVICE)
    end = values(4096, dtype=dtype)
    logits[-4096:] = end.to(DEVICE)
    got = ops.sample_mask(logits, SEED, backend=backend)[0, -512:].cpu()
    block = torch.arange((count - 4096) // 4, count // 4)
    key = (torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32))
    zero = torch.zeros_like(block)
    words = sampling.philox((block & 0xFFFFFFFF, block >> 32, zero, zero), key).flatten()
    assert torch.equal(got, ops.pack((words >> 8) < sampling.threshold(end)))


@large
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(
    "op, backend", back_ends("restore_frozen_", "masked_sgd_", "masked_adamw_")
)
def test_steps_behind_many_elements(op: str, backend: str, count: int) -> None:
    """The last entries, frozen and free, take the step that they take alone."""
    room_for(count, 10)
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    bits = torch.zeros(count // 8, dtype=torch.uint8, device=DEVICE)
    bits[-512:] = ops.pack(mask(4096).to(DEVICE))

    def end(seed: int) -> Tensor:
        return values(4096, seed=seed, dtype=dtype).to(DEVICE)

    def behind(seed: int) -> Tensor:
        whole = torch.zeros(count, dtype=dtype, device=DEVICE)
        whole[-4096:] = end(seed)
        return whole

    def step(make: Callable[[int], Tensor], frozen: Tensor) -> Tensor:
        param, other = make(0), make(1)
        if op == "restore_frozen_":
            ops.restore_frozen_([param], [other], [frozen], backend=backend)
        elif op == "masked_sgd_":
            ops.masked_sgd_(
                [param], [other], None, [frozen], lr=0.1, weight_decay=0.1, backend=backend
            )
        else:
            moments = [[torch.zeros_like(param)] for _ in range(2)]
            taken = [torch.zeros((), device=DEVICE)]
            ops.masked_adamw_(
                [param], [other], *moments, None, taken, [frozen], lr=0.1, backend=backend
            )
        return param[-4096:].clone()

    assert_same_bits(step(behind, bits), step(end, bits[-512:].clone()))


@large
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("op, backend", back_ends("masked_linear"))
@pytest.mark.parametrize("rows", [1, 40])
def test_rows_of_a_weight_of_many_elements(op: str, backend: str, count: int, rows: int) -> None:
    """Its last rows give what they give as a weight of their own, where one block computes them."""
    room_for(count, 4.5)
    k = 4096
    n, dtype = count // k, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    weight = torch.zeros(n, k, dtype=dtype, device=DEVICE)
    end = values(1, k, dtype=dtype).to(DEVICE)
    weight[-1] = end
    bits = torch.full((count // 8,), 255, dtype=torch.uint8, device=DEVICE)
    x = values(rows, k, seed=1, dtype=dtype).to(DEVICE)
    y = ops.masked_linear(x, weight, bits, backend=backend)
    assert not y[:, :-1].any()
    exact = x.double() @ end.double().T
    plain = torch.nn.functional.linear(x, end)
    assert_within_budget(y[:, -1:].contiguous(), plain, exact)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def calls(op: str, backend: str) -> tuple[Tensor, Callable[[], Any]]:
    """A tensor that an op reads and a call that reads it."""
    v = values(256, 256).to(DEVICE)
    bits = ops.pack(mask(256, 256).to(DEVICE))
    x = values(8, 256, seed=1).to(DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    return v, {
        "pack": lambda: ops.pack(v, 0.1, backend=backend),
        "sample_mask": lambda: ops.sample_mask(v, seed, 2, backend=backend),
        "topk_mask": lambda: ops.topk_mask(v, 0.3, backend=backend),
        "masked_linear": lambda: ops.masked_linear(x, v, bits, backend=backend),
        "learned_linear": lambda: ops.learned_linear(x, v, v, seed=seed, backend=backend),
    }[op]


GRAPHED = back_ends("pack", "sample_mask", "topk_mask", "masked_linear", "learned_linear")


@needs_gpu
@pytest.mark.parametrize("op, backend", GRAPHED)
def test_a_graph_replays_on_new_values(op: str, backend: str) -> None:
    read, call = calls(op, backend)
    graph, result = captured(call)
    for seed in (5, 6):
        read.copy_(values(256, 256, seed=seed))
        graph.replay()
        assert_same_bits(result, call())


@needs_gpu
def test_a_graph_draws_a_new_seed_each_time() -> None:
    logits = torch.zeros(4096, device=DEVICE)
    graph, result = captured(lambda: ops.sample_mask(logits))
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(result.clone())
    assert not torch.equal(*draws)


@pytest.mark.parametrize("op, backend", GRAPHED)
def test_launches_on_the_current_stream(op: str, backend: str) -> None:
    """What an op reads is written late, on a stream that is not the default one."""
    if not ON_GPU:
        _, call = calls(op, backend)
        assert_same_bits(call(), call())
        pytest.skip("needs a CUDA device")
    read, call = calls(op, backend)
    want_from = values(256, 256, seed=9).to(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        read.copy_(want_from)
        late = call()
    torch.cuda.synchronize()
    assert_same_bits(late, call())
    assert as_integers(read).equal(as_integers(want_from))
