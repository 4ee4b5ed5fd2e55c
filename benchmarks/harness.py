"""What every bench_<op>.py shares: verify, then time all contestants turn by turn, then a line and a CSV row.

A case names its contestants; `fastmask` is timed once for each back end, the others are what it is
compared with, in the same run:

    eager float    what one writes: the mask as a float tensor, multiplied in
    eager bool     the same with a bool mask
    best eager     the fastest plain torch that a patient author finds (memory allocated once, fused steps)
    prune          torch.nn.utils.prune: the product is made anew before each forward
    compile        torch.compile of eager float (on a GPU with max-autotune); only with --compile
    compile packed the same of plain torch that unpacks the bits
    save restore   an exact freeze: values are kept aside, the step is taken, they are written back
    merged         weights multiplied beforehand, where that is not as fast as `dense`
    dense          the same without any mask

A ratio is the median over rounds of the other's time over ours in that round; above 1 we are faster.
`floor_share` is the time that the case's bytes take at this device's measured bandwidth (of reading, copying
or updating in place, as the op does), or its arithmetic at the measured rate of a matrix product, whichever
is longer (`bound`), over ours.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastmask import _backend
from fastmask._benchmarks import machine, timing
from fastmask.errors import BackendUnavailable

RIVALS = (
    "eager float", "eager bool", "best eager", "prune", "compile", "compile packed", "save restore",
    "merged", "dense",
)  # fmt: skip
COLUMNS = (
    "commit", "device", "torch", "triton", "op", "backend", "dtype", "shape", "density", "threads", "malloc",
    "clock", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "gflop_per_s", "roof_gb_per_s", "roof_gflop_per_s",
    "bound", "floor_share", *(f"x_{name.replace(' ', '_')}" for name in RIVALS), "uncaptured", "load",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, str]


@dataclass(frozen=True)
class Contest:
    """A case with its tensors: what is checked and timed; `i` counts calls, to rotate what is read."""

    verify: Callable[[str], None]
    ours: Callable[[str, int], object]
    rivals: Mapping[str, timing.Contestant]
    grad: bool = False


@dataclass(frozen=True)
class Case:
    """One op at one shape, cheap until `prepare` makes its tensors."""

    op: str
    dtype: torch.dtype
    shape: str
    density: float
    bytes_moved: int
    prepare: Callable[[], Contest]
    flops: int = 0
    traffic: str = "read"
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.op} {name_of(self.dtype)} {self.shape} density {self.density}"


@dataclass(frozen=True)
class Setup:
    """What is asked: a device, sets of shapes, and how long."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shapes: tuple[str, ...] = ("default",)
    dtypes: tuple[torch.dtype, ...] = ()
    backends: tuple[str, ...] = ()
    compiled: bool = False
    rounds: int = 25
    limit: float = 10.0
    clock: str = ""

    @property
    def counted(self) -> str:
        """The clock asked for, or the device's own."""
        return self.clock or ("graph" if self.device.type == "cuda" else "wall")

    @property
    def small(self) -> bool:
        """Whether everything is tiny: the machinery is tried, not the speed."""
        return self.shapes == ("tiny",)


def name_of(dtype: torch.dtype) -> str:
    """A dtype without its package."""
    return str(dtype).removeprefix("torch.")


def ops() -> list[str]:
    """The ops that have a benchmark."""
    found = Path(__file__).parent.glob("bench_*.py")
    return sorted({p.stem.removeprefix("bench_") for p in found} & {p.name for p in _rooms()})


def _rooms() -> Iterable[Path]:
    return (p for p in (Path(_backend.__file__).parent / "ops").iterdir() if p.is_dir())


def cases(op: str, setup: Setup) -> Iterator[Case]:
    """The cases of an op in the shapes and dtypes asked for.

    Raises:
        ValueError: there is no such op, or it has no such set of shapes.
    """
    if op not in ops():
        raise ValueError(f"op: expected one of {', '.join(ops())}, got {op!r}")
    yield from importlib.import_module(f"fastmask._benchmarks.bench_{op}").cases(setup)


def backends(case: Case, setup: Setup) -> tuple[list[str], list[str]]:
    """The back ends on which a case is timed, and a sentence for each that cannot run it.

    One for few rows is timed up to four times as many as `auto` gives it, unless it is named.
    """
    usable, refused = [], []
    compiled = [b for b in _backend.preference(setup.device.type) if b != "reference"]
    for name in setup.backends or compiled:
        try:
            module = _backend.resolve(case.op, name, setup.device, case.dtype)
            few = 4 * getattr(module, "MOST_ROWS", case.rows)
            if setup.backends or case.rows <= few:
                usable.append(name)
        except BackendUnavailable as error:
            refused.append(str(error))
    return usable, refused


def measured(
    case: Case, setup: Setup, names: Sequence[str], say: Callable[[str], None] = print
) -> list[Row]:
    """Verify a case on each back end, time it beside its rivals, and return a row for each.

    Raises:
        AssertionError: a back end's result is wrong; nothing is timed.
    """
    torch.compiler.reset()
    contest = case.prepare()
    names = list(verified(case, contest, names, say))
    if not names:
        return []
    ours = {name: functools.partial(contest.ours, name) for name in names}
    rivals = {}
    for name, rival in contest.rivals.items():
        assert name in RIVALS, name
        try:
            with torch.set_grad_enabled(contest.grad):
                rival(0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's, of which there are many kinds
            if "compile" not in name:
                raise
            say(f"{name} cannot run {case}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        rivals[name] = rival
    calls = timing.calls_a_turn(setup.device, case.bytes_moved, case.flops)
    with torch.set_grad_enabled(contest.grad):
        times, uncaptured = timing.seconds(
            {**ours, **rivals}, setup.device, setup.rounds, setup.counted, setup.limit, calls
        )
    if setup.device.type == "cuda" and setup.counted != "graph":
        uncaptured = []
    return [_row(case, setup, name, times, uncaptured) for name in names]


def verified(
    case: Case, contest: Contest, names: Sequence[str], say: Callable[[str], None] = print
) -> Iterator[str]:
    """Verify a case on each back end; yield those that run it, say which lacks a part of it.

    Raises:
        AssertionError: a result is wrong.
    """
    for name in names:
        try:
            with torch.set_grad_enabled(contest.grad):
                contest.verify(name)
        except BackendUnavailable as error:
            say(f"passed by: {case}: {error}")
        else:
            yield name


def _row(
    case: Case, setup: Setup, backend: str, times: dict[str, list[float]], uncaptured: list[str]
) -> Row:
    taken, device = times[backend], setup.device
    middle = statistics.median(taken)
    clock = setup.counted if device.type == "cpu" else "wall"
    bandwidth = timing.bandwidth(device, case.traffic, clock, setup.small)
    peak = timing.peak(device, case.dtype, clock, setup.small) if case.flops else 0.0
    moving = case.bytes_moved / bandwidth
    adding = case.flops / peak if peak else 0.0
    on_cpu = device.type == "cpu"
    found: dict[str, object] = {
        "commit": machine.commit(),
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "op": case.op,
        "backend": backend,
        "dtype": name_of(case.dtype),
        "shape": case.shape,
        "density": case.density,
        "threads": torch.get_num_threads() if on_cpu else "",
        "malloc": ("tuned" if machine.tuned() else "default") if on_cpu else "",
        "clock": "events" if backend in uncaptured else setup.counted,
        "gb_per_s": f"{case.bytes_moved / middle / 1e9:.2f}",
        "gflop_per_s": f"{case.flops / middle / 1e9:.2f}" if case.flops else "",
        "roof_gb_per_s": f"{bandwidth / 1e9:.2f}",
        "roof_gflop_per_s": f"{peak / 1e9:.2f}" if peak else "",
        "bound": "flops" if adding > moving else "bytes",
        "floor_share": f"{max(moving, adding) / middle:.3f}",
        "uncaptured": "/".join(name for name in uncaptured if name in RIVALS),
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    for name, share in (("p20_ms", 0.2), ("p50_ms", 0.5), ("p80_ms", 0.8)):
        found[name] = f"{_percentile(taken, share) * 1e3:.4f}"
    for name in RIVALS:
        others = times.get(name)
        ratios = [b / a for a, b in zip(taken, others, strict=True)] if others else None
        column = f"x_{name.replace(' ', '_')}"
        found[column] = "" if ratios is None else f"{statistics.median(ratios):.2f}"
    return {name: str(found[name]) for name in COLUMNS}


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


@dataclass
class Outcome:
    """What a run of cases came to."""

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    passed_by: list[str] = field(default_factory=list)


def run(
    planned: Iterable[Case],
    setup: Setup,
    say: Callable[[str], None] = print,
    until: float = float("inf"),
    table: Path | None = None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Measure cases until `time.monotonic()` reaches `until`; rows go to a CSV file as they come.

    A case whose result is wrong is named and not timed, one that no back end can run is passed by, each
    with one line. An outcome given is added to.
    """
    outcome = outcome or Outcome()
    for case in planned:
        if time.monotonic() > until:
            outcome.left_out.append(str(case))
            continue
        names, refused = backends(case, setup)
        for sentence in refused:
            if sentence not in outcome.passed_by:
                outcome.passed_by.append(sentence)
                say(f"passed by: {sentence}")
        if not names:
            continue
        try:
            rows = measured(case, setup, names, say)
        except AssertionError as error:
            outcome.wrong.append(f"{case}: {error}")
            say(f"WRONG, not timed: {outcome.wrong[-1]}")
            continue
        except torch.OutOfMemoryError as error:
            outcome.left_out.append(f"{case} (out of memory)")
            say(f"left out: {case}: {str(error).splitlines()[0]}")
            continue
        except Exception as error:  # the kernels' compiler has kinds of its own
            outcome.wrong.append(f"{case}: {type(error).__name__}: {_first_line(error)}")
            say(f"WRONG, not timed: {outcome.wrong[-1]}")
            continue
        outcome.rows += rows
        for row in rows:
            say(line(row))
        if table is not None:
            append(table, rows)
    return outcome


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def line(row: Row) -> str:
    """A row as one line of text."""
    ratios = "  ".join(
        f"{row[c]}x {c[2:].replace('_', ' ')}" for c in COLUMNS if c[:2] == "x_" and row[c]
    )
    rate = f", {row['gflop_per_s']} GFLOP/s" if row["gflop_per_s"] else ""
    return (
        f"{row['op']} {row['backend']} {row['dtype']} {row['shape']} density {row['density']}: "
        f"{row['p50_ms']} ms, {row['gb_per_s']} GB/s{rate}, floor {row['floor_share']} ({row['bound']}); "
        f"{ratios}; load {row['load']}"
    )


def append(table: Path, rows: Sequence[Row]) -> None:
    """Add rows to a CSV file, whose columns must be these.

    Raises:
        ValueError: the file has other columns.
    """
    new = not table.exists()
    if not new:
        with table.open(encoding="utf-8", newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise ValueError(f"{table}: its columns are of another version; name a new file")
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(op: str, description: str | None) -> None:
    """Command line of a bench_<op>.py: verify and time each case, print a line each, append rows to --csv."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="default", help="sets of shapes, with commas [default]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... [cpu]")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeat for several")
    parser.add_argument("--backend", action="append", help="repeat for several [all compiled ones]")
    parser.add_argument("--compile", action="store_true", help="torch.compile competes too")
    parser.add_argument("--rounds", type=int, default=25, help="rounds a case [25]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default")
    parser.add_argument("--csv", type=Path, help="file to which the rows are appended")
    clocks = (*timing.CLOCKS, "graph", "events")
    parser.add_argument("--clock", choices=clocks, default="", help="what is counted")
    given = parser.parse_args()
    if given.clock == "thread" and given.threads != 1:
        parser.error("--clock thread counts one thread alone: give --threads 1 with it")
    if given.malloc == "tuned" and not machine.tuned():
        machine.restart_tuned()
    torch.set_num_threads(given.threads)
    setup = Setup(
        device=torch.device(given.device),
        shapes=tuple(given.shapes.split(",")),
        dtypes=tuple(DTYPES[name] for name in given.dtype or ()),
        backends=tuple(given.backend or ()),
        compiled=given.compile,
        rounds=given.rounds,
        clock=given.clock,
    )
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    outcome = run(cases(op, setup), setup, table=given.csv)
    sys.exit(1 if outcome.wrong else 0)
