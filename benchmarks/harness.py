"""What every bench_<op>.py shares: verify, then time all contestants turn by turn, then a line and a CSV row.

A case names its contestants; `fastmask` is timed, the others are what it is compared with:

    eager float    what one writes: the mask as a float tensor, multiplied in
    eager bool     the same with a bool mask
    best eager     the fastest plain torch that a patient author finds (memory allocated once, fused steps)
    dense          the same without any mask

In each round every contestant runs once, in a changing order, so that a busy moment meets all of them. A
ratio is the median over rounds of the other's time over ours in that round; above 1 we are faster. `floor`
is the time that moving the case's bytes at this machine's measured copy bandwidth takes, over ours. On a
machine that others use too, `--threads 1 --clock thread` counts the processor time of the calling thread.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
BASELINES = ("eager float", "eager bool", "best eager", "dense")
COLUMNS = (
    "commit", "device", "torch", "triton", "op", "backend", "dtype", "shape", "density", "threads",
    "clock", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "floor_share",
    *(f"x_{name.replace(' ', '_')}" for name in BASELINES), "load",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op at one shape: `contestants` are called with the round's number, to rotate what they read."""

    op: str
    dtype: str
    shape: str
    density: float
    bytes_moved: int
    verify: Callable[[], None]
    contestants: dict[str, Callable[[int], object]]
    backend: str = "cpu"


def percentile(values: Sequence[float], share: float) -> float:
    """The value at a share of the sorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def measure(
    case: Case, rounds: int, clock: Callable[[], float] = time.perf_counter, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in case.contestants}
    order, started = list(case.contestants), time.perf_counter()
    shuffle = random.Random(0)
    for i in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            begin = clock()
            case.contestants[name](i)
            times[name].append(clock() - begin)
        if i >= 3 and time.perf_counter() - started > seconds:
            break
    return {name: taken[1:] for name, taken in times.items()}


@functools.cache
def copy_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second, read and written, of the fastest of a few copies of 256 MB."""
    source, target = torch.ones(2**26), torch.ones(2**26)
    taken = []
    for _ in range(7):
        begin = clock()
        target.copy_(source)
        taken.append(clock() - begin)
    return 2 * source.nbytes / min(taken)


def row(case: Case, times: dict[str, list[float]], clock: str) -> dict[str, object]:
    """The CSV row of a measured case."""
    ours = times["fastmask"]
    middle = statistics.median(ours)
    found: dict[str, object] = {
        "commit": commit(),
        "device": device(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "op": case.op,
        "backend": case.backend,
        "dtype": case.dtype,
        "shape": case.shape,
        "density": case.density,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "gb_per_s": f"{case.bytes_moved / middle / 1e9:.2f}",
        "floor_share": f"{case.bytes_moved / copy_bandwidth(CLOCKS[clock]) / middle:.3f}",
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    for name, share in (("p20_ms", 0.2), ("p50_ms", 0.5), ("p80_ms", 0.8)):
        found[name] = f"{percentile(ours, share) * 1e3:.4f}"
    for name in BASELINES:
        others = times.get(name)
        ratios = [b / a for a, b in zip(ours, others, strict=True)] if others else None
        column = f"x_{name.replace(' ', '_')}"
        found[column] = "" if ratios is None else f"{statistics.median(ratios):.2f}"
    return {name: found[name] for name in COLUMNS}


def commit() -> str:
    """The commit measured, with a + where the tree differs from it."""
    here = Path(__file__).parent
    git = ("git", "-C", str(here))
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../csrc", "../fastmask/ops"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else ""


@functools.cache
def device() -> str:
    """The processor's name, with the engine's instruction set."""
    from fastmask import _cpu

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {_cpu.isa()}"


def version(package: str) -> str:
    """The version of a package, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def rotate(*tensors: torch.Tensor, past: int = 2**26) -> list[tuple[torch.Tensor, ...]]:
    """Copies of the same tensors, as many as it takes to reach past every cache, at most 8."""
    size = sum(tensor.nbytes for tensor in tensors)
    copies = min(8, 1 + past // max(size, 1))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


def report(cases: Iterable[Case], description: str | None) -> None:
    """Command line of a benchmark: verify and time each case, print a line each, append rows to --csv."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=25, help="rounds a case [25]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="file to which the rows are appended")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is counted [wall]")
    options = parser.parse_args()
    if options.clock == "thread" and options.threads != 1:
        parser.error("--clock thread counts one thread alone: give --threads 1 with it")
    torch.set_num_threads(options.threads)
    rows = []
    for case in cases:
        case.verify()
        times = measure(case, options.rounds, CLOCKS[options.clock])
        rows.append(row(case, times, options.clock))
        found = rows[-1]
        ratios = "  ".join(
            f"{found[c]}x {c[2:].replace('_', ' ')}" for c in COLUMNS if c[:2] == "x_" and found[c]
        )
        print(
            f"{case.op} {case.dtype} {case.shape} density {case.density}: {found['p50_ms']} ms, "
            f"{found['gb_per_s']} GB/s, floor {found['floor_share']}; {ratios}; load {found['load']}",
            flush=True,
        )
    if options.csv is not None:
        new = not options.csv.exists()
        with options.csv.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
