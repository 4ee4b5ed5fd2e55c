"""Everything that wants a GPU, by one command and within a time: build, checks, benchmarks, figure.

python benchmarks/gpu_suite.py --out gpu [--minutes 8.5] [--wheels FOLDER] [--dry-run]

Needs torch, Triton and numpy, and nvcc for the CUDA extension; what else is missing (pytest, hypothesis,
pybind11, ninja, safetensors) may lie as wheels in a folder. Stages, each with a line and a time:

    build       both extensions, by this machine's compilers, in place
    verify      each op on each back end in small and awkward shapes, as benchmarks check their cases
    tests       tests/ops on the device: every path of every op, the CPU's bits, graphs, 2^31 elements
    memcheck    the small shapes again under compute-sanitizer, where it runs on this machine
    racecheck   the same, for races in shared memory
    benchmarks  cases by importance until the time is over; what was left out is named in log.txt

The four in the middle share the device; benchmarks run alone. Each stage is a program of its own: what one
of them breaks is broken for it alone, and benchmarks go on behind the case that ended them. Writes
results.csv, results.md, results-roofline.png and .svg, summary.md (after each stage) and log.txt. Ends with 1
where anything was wrong. `--dry-run` takes the CPU and tiny shapes through the same stages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = str(Path(__file__).with_name("gpu_cases.py"))
GOOD, WRONG, LEFT = "ok", "WRONG", "left out"
# How much of a log is kept from each end, and what begins a line of it that gpu_cases.py has for the suite.
KEPT, MARK = 500_000, "@ "


@dataclass
class Stage:
    """What one stage came to."""

    name: str
    state: str
    said: str
    seconds: float = 0.0


@dataclass
class Suite:
    """The options, and what has been found so far."""

    out: Path
    ends: float
    dry: bool
    env: dict[str, str]
    where: str = ""
    began: float = field(default_factory=time.monotonic)
    stages: list[Stage] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def note(self, stage: Stage) -> None:
        """Keep and print a stage; what is known so far is written, should this program be ended."""
        self.stages.append(stage)
        (self.out / "summary.md").write_text(summary(self))
        print(f"{stage.name:12}{stage.state:10}{stage.seconds:6.1f} s  {stage.said}", flush=True)

    def start(
        self, log: str, *words: str, under: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> Running:
        """Start Python on a program of this checkout, perhaps under another; its output is a log."""
        with_more = {**self.env, **(env or {})}
        return Running([*under, sys.executable, *words], self.out / f"{log}.log", with_more)


class Running:
    """A program that has started, with all that it starts."""

    def __init__(self, words: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.began, self.log = time.monotonic(), log
        self.seconds = 0.0
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def end(self, limit: float) -> tuple[int, str]:
        """Exit status and output; -1 where it took longer than the limit and was stopped."""
        try:
            status = self.process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            status = -1
        self.seconds = time.monotonic() - self.began
        return status, self.log.read_text(errors="replace")


def build(suite: Suite) -> None:
    """Both extensions in place."""
    running = suite.start("build", "setup.py", "build_ext", "--inplace")
    done, _ = running.end(min(120, suite.left()))
    asked = "from fastmask import _backend as b; print('|'.join(f'{n}: {b.missing(n)}' for n in b.BACKENDS))"
    _, answer = suite.start("backends", "-c", asked).end(60)
    absent = [each for each in _last(answer, 0).split("|") if not each.endswith(": None")]
    if suite.dry:
        absent = [each for each in absent if each.startswith("cpu")]
    # Kernels that the sources have and that could not be built are wrong; those not written are not.
    absent = [each for each in absent if "kernels yet" not in each]
    state = WRONG if absent or done != 0 else GOOD
    suite.note(Stage("build", state, "; ".join(absent) or "engines built", running.seconds))


def _last(said: str, status: int) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else "it said nothing"
    return "stopped at its time limit; " + last if status == -1 else last


def check(suite: Suite) -> None:
    """What holds or does not, side by side: the small shapes, the tests, the sanitizer's two tools."""
    dry = ("--dry-run",) if suite.dry else ()
    sets = "small" if suite.dry else "awkward"
    running = {"verify": suite.start("verify", CASES, "--verify", sets, *dry)}
    if tests := test_words(suite):
        running["tests"] = suite.start("tests", *tests)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        if suite.dry or not Path(sanitizer).exists():
            why = "no GPU here" if suite.dry else "no compute-sanitizer here"
            suite.note(Stage(tool, LEFT, why))
            continue
        # What torch tries of the driver, and finds that it lacks, is no error of a kernel.
        under = (sanitizer, "--tool", tool, "--error-exitcode", "99", "--print-limit", "100",
                 "--report-api-errors", "no")  # fmt: skip
        # Tensors side by side in one block of torch's would hide what is read behind their ends.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        running[tool] = suite.start(tool, CASES, "--verify", "small", under=under, env=env)
    until = time.monotonic() + min(270.0, suite.left() - 120)
    for name, each in running.items():
        status, said = each.end(until - time.monotonic())
        judge = {"verify": judged, "tests": judged_tests}.get(name, judged_sanitizer)
        suite.note(Stage(name, *judge(status, said), each.seconds))


def judged(status: int, said: str) -> tuple[str, str]:
    """State and sentence of a program that says in its last line what it found.

    One that was stopped is wrong where pytest's dots have an F or E among them.
    """
    if status == -1 and not re.search(r"^[.sx]*[FE][.sxFE]*( |$)", said, re.MULTILINE):
        return LEFT, _last(said, status)
    return GOOD if status == 0 else WRONG, _last(said, status)


def judged_tests(status: int, said: str) -> tuple[str, str]:
    """The same of pytest, which is content where everything is skipped."""
    state, sentence = judged(status, said)
    if state == GOOD and (
        "needs a CUDA device" in said or not re.search(r"\b\d+ passed", sentence)
    ):
        return WRONG, f"not run on the device: {sentence}"
    return state, sentence


def judged_sanitizer(status: int, said: str) -> tuple[str, str]:
    """The same of compute-sanitizer, which some machines do not let read the device.

    Other libraries' kernels run under it too: what it finds in theirs is named and is not our error.
    """
    found = [line.strip("= ") for line in said.splitlines() if "SUMMARY:" in line]
    places = set(re.findall(r"\b(?:at|by|in) (?:kernel )?([^\n]+?)(?:\+0x|\(.*\)\+0x)", said))
    ours = sorted(place for place in places if "fastmask" in place or re.match(r"_\w+$", place))
    if "Device not supported" in said:
        return LEFT, "this machine does not let it read the device"
    if status == -1 and not ours:
        return LEFT, "not through within its time"
    sentence = found[-1] if found else _last(said, status)
    if ours:
        return WRONG, f"{sentence}, in {', '.join(ours)}"
    if status == 99 and places:
        return GOOD, f"{sentence}, none of them in these kernels: {', '.join(sorted(places))[:200]}"
    return GOOD if status == 0 and found else WRONG, sentence


def test_words(suite: Suite) -> list[str]:
    """The call of pytest for the ops on this device; nothing where it is not installed."""
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        wanted = f"{' and '.join(absent)} not installed: carry the wheels (--wheels)"
        suite.note(Stage("tests", WRONG, wanted))
        return []
    many = importlib.util.find_spec("xdist") is not None and not suite.dry
    return [
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
        # A device that a kernel broke fails all tests that come after, which say nothing.
        "--maxfail", "60",
        *(("-n", "12", "--dist", "loadgroup") if many else ()),
        *(("tests/ops/test_popcount.py",) if suite.dry else ("-k", "device- or test_devices", "tests/ops")),
    ]  # fmt: skip


def benchmark(suite: Suite) -> None:
    """Cases in their order until the time is over, then the table and the figure."""
    from fastmask._benchmarks import figures

    began, table = time.monotonic(), suite.out / "results.csv"
    table.unlink(missing_ok=True)
    dry = ("--dry-run",) if suite.dry else ()
    first, wrong, left = 0, [], []
    while True:
        words = ("--from", str(first), "--until", str(suite.ends - 20), "--csv", str(table))
        running = suite.start(f"benchmarks-{first}", CASES, *words, *dry)
        status, said = running.end(suite.left() - 8)
        print(said, flush=True)
        marks = [
            json.loads(line[len(MARK) :]) for line in said.splitlines() if line.startswith(MARK)
        ]
        wrong += [each for mark in marks for each in mark.get("wrong", ())]
        left += [each for mark in marks for each in mark.get("left", ())]
        begun = [mark for mark in marks if "next" in mark]
        if status == -1 and begun:
            left.append(begun[-1]["case"] + " and what follows")
        elif status not in (0, 3):
            wrong.append(f"{begun[-1]['case'] if begun else 'the start'}: {_last(said, status)}")
        if status in (0, -1) or not begun or suite.left() < 40:
            break
        first = begun[-1]["next"]
    said = f"{len(wrong)} wrong, {len(left)} cases left out"
    found = figures.read(table) if table.exists() else []
    if found:
        drawn = figures.write(table, suite.out)
        said += "" if len(drawn) > 1 else "; no figure: matplotlib is not installed"
    said = f"{len(found)} rows, {said}" + (
        f", first {' '.join(wrong[0].split())[:300]}" if wrong else ""
    )
    state = WRONG if wrong or not found else GOOD
    suite.note(Stage("benchmarks", state, said, time.monotonic() - began))


def summary(suite: Suite) -> str:
    """The stages as a markdown table."""
    import torch

    lines = [
        f"# {suite.where}, torch {torch.__version__}",
        "",
        "| stage | | seconds | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {s.name} | {s.state} | {s.seconds:.0f} | {s.said.replace('|', '/')} |"
            for s in suite.stages
        ),
        "",
        f"{time.monotonic() - suite.began:.0f} s in all.",
    ]
    return "\n".join(lines) + "\n"


def _ends(text: str) -> str:
    """A log, without its middle where it is long."""
    return text if len(text) <= 2 * KEPT else f"{text[:KEPT]}\n[...]\n{text[-KEPT:]}"


def _install(wheels: Path, where: Path) -> None:
    files = [str(file) for file in sorted(wheels.glob("*.whl"))]
    quiet = ("-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *quiet, "--target", str(where), *files], check=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything [8.5]")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this Python lacks")
    parser.add_argument("--dry-run", action="store_true", help="the CPU and tiny shapes")
    parser.add_argument("--no-build", action="store_true", help="the extensions are there")
    given = parser.parse_args()
    began = time.monotonic()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    wheels = tempfile.TemporaryDirectory()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if given.wheels:
        _install(given.wheels.absolute(), Path(wheels.name))
        paths.insert(1, wheels.name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    sys.path[:0] = [str(ROOT), *paths[1:-1]]
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print(
            "torch sees no CUDA device; --dry-run tries the machinery on the CPU", file=sys.stderr
        )
        return 2
    if not given.dry_run:
        major, minor = torch.cuda.get_device_capability()
        env.setdefault("FASTMASK_CUDA_ARCHS", f"{major}{minor}" + "a" * (major == 9))
    where = "the CPU, dry" if given.dry_run else torch.cuda.get_device_name()
    suite = Suite(out, began + 60 * given.minutes, given.dry_run, env, where, began)
    stages = (*(() if given.no_build else (build,)), check, benchmark)
    for stage in stages:
        try:
            stage(suite)
        except Exception as error:  # what was found before is worth more than this program's end
            suite.note(Stage(stage.__name__, WRONG, f"{type(error).__name__}: {error}"))
    logs = sorted(out.glob("*.log"))
    (out / "log.txt").write_text("".join(f"==== {p.stem}\n{_ends(p.read_text())}\n" for p in logs))
    for log in logs:
        log.unlink()
    print(summary(suite))
    return 1 if any(stage.state == WRONG for stage in suite.stages) else 0


if __name__ == "__main__":
    sys.exit(main())
