"""The cases of gpu_suite.py, in processes of their own: what a kernel breaks is broken for them alone.

python benchmarks/gpu_cases.py --verify small|awkward [--dry-run]
python benchmarks/gpu_cases.py --from CASE --until MONOTONIC --csv FILE [--dry-run]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fastmask._benchmarks import gpu_suite, harness

# Names of sets and ops by what a first look at a device wants to know; the rest follows.
PLAN: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    # op, set of shapes, dtypes, torch.compile too
    ("masked_linear", "default", ("bfloat16",), False),
    ("sample_mask", "default", (), False),
    ("masked_adamw_", "default", (), False),
    ("masked_sgd_", "default", (), False),
    ("learned_linear", "default", ("bfloat16",), False),
    ("compressed_linear", "default", (), False),
    ("topk_mask", "default", (), False),
    ("pack", "default", (), False),
    ("unpack", "default", (), False),
    ("popcount", "default", (), False),
    ("restore_frozen_", "default", (), False),
    ("masked_conv2d", "default", ("bfloat16",), False),
    # Tuning what it compiles takes torch.compile a good part of a minute a case.
    ("masked_linear", "4096x11008x16,4096x11008x256,4096x11008x1", ("bfloat16",), True),
    ("masked_linear", "default", ("float32",), False),
    ("learned_conv2d", "default", ("bfloat16",), False),
    ("learned_weight", "default", ("bfloat16",), False),
    ("masked_weights", "default", ("float32",), False),
    ("learned_weights", "default", ("float32",), False),
    ("learned_linear", "4096x4096x256", ("bfloat16",), True),
    ("learned_linear_step_", "default", ("bfloat16",), False),
    ("masked_linear", "tasks", ("bfloat16",), False),
    ("masked_linear", "densities", ("bfloat16",), False),
    ("masked_linear", "training", ("bfloat16",), False),
    ("masked_linear", "heads,vit-b", ("bfloat16",), False),
    ("learned_linear", "default", ("float32",), False),
    ("masked_linear", "llama3-8b,llama-70b", ("bfloat16",), False),
)


def verify(sets: str, dry: bool) -> int:
    """Verify every op's tiny cases, and the awkward linear ones; the number of wrong ones."""
    device = torch.device("cpu" if dry else "cuda")
    floats = (torch.float32,) if dry else (torch.float32, torch.bfloat16, torch.float16)
    tiny = harness.Setup(device=device, shapes=("tiny",), dtypes=floats)
    cases = [case for op in harness.ops() for case in harness.cases(op, tiny)]
    if sets == "awkward":
        odd = dataclasses.replace(tiny, shapes=("adversarial",), dtypes=floats[:2])
        cases += harness.cases("masked_linear", odd)
    wrong, checked, passed_by = [], 0, set()
    for case in cases:
        names, refused = harness.backends(case, tiny)
        passed_by |= set(refused)
        if not names:
            continue
        for name in names:
            try:
                checked += len(list(harness.verified(case, case.prepare(), [name])))
            except Exception as error:  # a compiler's too
                wrong.append(f"{case} on {name}: {type(error).__name__}: {error}")
        if wrong and broken(device):
            wrong.append("nothing runs on the device any more: the rest was not checked")
            break
    for sentence in (*sorted(passed_by), *wrong):
        print(sentence)
    first = f", first {' '.join(wrong[0].split())[:300]}" if wrong else ""
    print(f"{checked} checks, {len(wrong)} wrong{first}")
    return len(wrong) or int(checked == 0)


def broken(device: torch.device) -> bool:
    """Whether a kernel has left the device unusable for this process."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def planned(dry: bool) -> Iterator[tuple[harness.Case, harness.Setup]]:
    """Cases with their set-ups, the important ones first, none twice."""
    seen: set[str] = set()
    for op, sets, dtypes, compiled in PLAN:
        setup = harness.Setup(
            device=torch.device("cpu" if dry else "cuda"),
            shapes=("tiny",) if dry else tuple(sets.split(",")),
            dtypes=() if dry else tuple(harness.DTYPES[name] for name in dtypes),
            compiled=compiled and not dry,
            rounds=2 if dry else 25,
            limit=0.2 if dry else 1.5,
        )
        for case in harness.cases(op, setup):
            if f"{case} {setup.compiled}" not in seen:
                seen.add(f"{case} {setup.compiled}")
                yield case, setup


def bench(table: Path, first: int, until: float, dry: bool) -> int:
    """Cases from one on, in their order until the time is over; 3 where the device is broken then."""
    for i, (case, setup) in enumerate(planned(dry)):
        if i < first:
            continue
        outcome = harness.Outcome()
        _say(gpu_suite.MARK + json.dumps({"next": i + 1, "case": str(case)}))
        harness.run([case], setup, _say, until, table, outcome)
        if outcome.wrong or outcome.left_out:
            found = {"wrong": outcome.wrong, "left": outcome.left_out}
            _say(gpu_suite.MARK + json.dumps(found))
        if outcome.wrong and broken(setup.device):
            return 3
    return 0


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verify", choices=("small", "awkward"), help="check, time nothing")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", help="number of the first case"
    )
    parser.add_argument("--until", type=float, default=float("inf"), help="of time.monotonic()")
    parser.add_argument("--csv", type=Path, default=Path("results.csv"))
    parser.add_argument("--dry-run", action="store_true", help="the CPU and tiny shapes")
    given = parser.parse_args()
    if given.verify:
        return 1 if verify(given.verify, given.dry_run) else 0
    return bench(given.csv, given.first, given.until, given.dry_run)


if __name__ == "__main__":
    sys.exit(main())
