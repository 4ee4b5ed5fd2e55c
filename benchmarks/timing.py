"""Clocks: turn by turn on the CPU, graphs between events on a GPU; and the roofs above both.

On a GPU a turn is one replay of a CUDA graph of several calls over rotated copies of the weight, more bytes
than the L2 holds three times, so that every call reads device memory; the time is the replay's between two
events over the number of calls. What cannot be captured (a result read on the host) is called as often
between the same events, its launches counted.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
Contestant = Callable[[int], object]


def seconds(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    rounds: int,
    clock: str,
    limit: float,
    calls: int,
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds a call of each contestant in each round, and on a GPU who was not captured.

    In each round every contestant has one turn, in a changing order, so that a busy moment meets all.
    """
    if device.type == "cuda":
        return _on_gpu(contestants, rounds, clock, limit, calls)
    now = CLOCKS[clock]

    def turn(name: str, i: int) -> float:
        contestant = contestants[name]
        began = now()
        for j in range(i * calls, (i + 1) * calls):
            contestant(j)
        return (now() - began) / calls

    return _in_turns(list(contestants), turn, rounds, limit), []


def _in_turns(
    names: list[str], turn: Callable[[str, int], float], rounds: int, limit: float
) -> dict[str, list[float]]:
    """Times of rounds in shuffled order after one that is not counted; at least 3, then until the limit."""
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle, began = random.Random(0), time.perf_counter()
    order = list(names)
    for i in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(turn(name, i))
        if i >= 3 and time.perf_counter() - began > limit:
            break
    return {name: taken[1:] for name, taken in times.items()}


def _on_gpu(
    contestants: Mapping[str, Contestant], rounds: int, clock: str, limit: float, calls: int
) -> tuple[dict[str, list[float]], list[str]]:
    turns: dict[str, Callable[[], object]] = {}
    uncaptured = []
    for name, contestant in contestants.items():
        captured = _captured(contestant, calls) if clock == "graph" else None
        if captured is None:
            uncaptured.append(name)
        turns[name] = captured or functools.partial(_called, contestant, calls)

    def turn(name: str, _: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        turns[name]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return _in_turns(list(turns), turn, rounds, limit), uncaptured


def _called(contestant: Contestant, calls: int) -> None:
    for i in range(calls):
        contestant(i)


def _captured(contestant: Contestant, calls: int) -> Callable[[], object] | None:
    """The replay of a graph of so many calls; None where one of them cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            contestant(0)
            # What waits for the device is found out here, where finding out breaks nothing.
            torch.cuda.set_sync_debug_mode("error")
            try:
                _called(contestant, 2)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            _called(contestant, calls)
    except Exception:
        torch.cuda.synchronize()
        # A capture that broke off leaves the generator waiting for its end: it takes a fresh state.
        ours = torch.cuda.default_generators[torch.cuda.current_device()]
        fresh = torch.Generator(device="cuda").manual_seed(0)
        ours.graphsafe_set_state(fresh.graphsafe_get_state())
        return None
    return graph.replay


def calls_a_turn(device: torch.device, bytes_moved: int, flops: int = 0) -> int:
    """On a GPU calls that read more than three times what the L2 holds, 4 to 32.

    On the CPU about 8 ms of the floor, 1 to 20: the first call after another contestant's finds its code
    out of the caches, 0.1 to 0.2 ms (AMD EPYC), which rivals that all call the same two functions do not.
    """
    if device.type != "cuda":
        return max(1, min(20, 2**28 // max(bytes_moved, flops // 6, 1)))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(4, min(32, 1 + 3 * cache // max(bytes_moved, 1)))


def rotate(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Copies of the tensors: enough of the first to reach past every cache, at most 8, on a GPU 32."""
    first = tensors[0]
    size = max(1, first.nbytes)
    if first.is_cuda:
        cache = torch.cuda.get_device_properties(first.device).L2_cache_size
        copies = min(32, 1 + 3 * cache // size)
    else:
        copies = min(8, 1 + 2**26 // size)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


@functools.cache
def bandwidth(
    device: torch.device, traffic: str = "read", clock: str = "wall", small: bool = False
) -> float:
    """Bytes a second of the fastest of a few plain passes over 512 MB, on a GPU 4 GB.

    `copy` counts what is read and written, `update` the same in place, `read` a sum (or the copy where that
    is faster): they differ by a factor of 1.6 on some CPUs, and a kernel is measured by its own kind.
    """
    n = 2**20 if small else 2**26 if device.type == "cpu" else 2**29
    source, target = torch.ones(n, device=device), torch.ones(n, device=device)
    if traffic == "update":
        return 2 * source.nbytes / _fastest(lambda _: source.mul_(1.0), device, clock)
    copied = 2 * source.nbytes / _fastest(lambda _: target.copy_(source), device, clock)
    if traffic == "copy":
        return copied
    return max(copied, source.nbytes / _fastest(lambda _: source.sum(), device, clock))


@functools.cache
def peak(
    device: torch.device, dtype: torch.dtype, clock: str = "wall", small: bool = False
) -> float:
    """Operations a second of the fastest of a few products of square random matrices."""
    n = 256 if small else 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda _: a @ b, device, clock)


def _fastest(function: Contestant, device: torch.device, clock: str) -> float:
    counted = clock if device.type == "cpu" else "events"
    times, _ = seconds({"it": function}, device, 7, counted, 5.0, 1)
    return min(times["it"])
