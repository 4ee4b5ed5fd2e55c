"""The transfer study on the CPU engine against the same study on the reference ops, digits, turn by turn.

    python benchmarks/bench_transfer_backends.py [--layers 12] [--seeds 1] [--repeats 3]

Whole sweeps, run by run (`engine="loop"`, or masks over layers of the backbone), one process, from one
source to all targets. The rows are compared first: accuracies may be at most one test image apart. The ratio
is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from fastmask import _backend, data
from fastmask.report import Row
from fastmask.transfer import Config, run


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Have `auto` choose among these back ends."""
    with mock.patch.object(_backend, "preference", return_value=names):
        _backend._resolve.cache_clear()
        yield
    _backend._resolve.cache_clear()


def sweep(settings: dict[str, object], *names: str) -> tuple[float, tuple[Row, ...]]:
    """Seconds and rows of a sweep."""
    with tempfile.TemporaryDirectory() as folder, only(*names):
        config = Config(out=str(Path(folder) / "run"), **settings)  # type: ignore[arg-type]
        began = time.perf_counter()
        rows = run(config).rows
        return time.perf_counter() - began, rows


def agree(ours: tuple[Row, ...], reference: tuple[Row, ...], images: int) -> float:
    """The largest difference of an accuracy in test images; raise above one."""
    apart = 0.0
    for a, b in zip(ours, reference, strict=True):
        pairs = (
            (a.source_accuracy, b.source_accuracy),
            (a.target_accuracy, b.target_accuracy),
            (a.source_accuracy_before, b.source_accuracy_before),
        )
        apart = max(apart, *(abs(x - y) * images for x, y in pairs))
        if apart > 1.5:
            raise SystemExit(f"{a} and {b} are {apart:.1f} test images apart; not timed")
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", default="", help="layers of the backbone, by name or pattern")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    settings: dict[str, object] = {
        "data": "digits",
        "engine": "loop",
        "seeds": given.seeds,
        "sources": ("handwritten",),
        "layers": (given.layers,) if given.layers else (),
    }
    domains = data.load("digits")
    images = min(len(domains.split(name, 0).test) for name in domains.domains)
    _, ours = sweep(settings, "cpu", "reference")
    _, reference = sweep(settings, "reference")
    apart = agree(ours, reference, images)
    print(f"{len(ours)} runs; accuracies at most {apart:.0f} of {images} test images apart")
    turns = [
        (sweep(settings, "cpu", "reference")[0], sweep(settings, "reference")[0])
        for _ in range(given.repeats)
    ]
    fast, slow = (statistics.median(both) for both in zip(*turns, strict=True))
    ratios = sorted(turn[1] / turn[0] for turn in turns)
    print(f"CPU engine {fast:.1f} s, reference ops {slow:.1f} s; torch {torch.__version__}")
    print(
        f"the engine is {statistics.median(ratios):.2f} times as fast "
        f"(lowest {ratios[0]:.2f}, highest {ratios[-1]:.2f}, {len(ratios)} turns)"
    )


if __name__ == "__main__":
    main()
