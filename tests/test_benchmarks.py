"""Benchmarks run, agree before they time, and say a ratio; the table and figure come from the file."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastmask import _backend
from fastmask._benchmarks import figures, harness, rivals, shapes, timing
from fastmask.cli.app import app

ROOT = Path(__file__).parents[1]
OPS = sorted(p.name for p in (ROOT / "fastmask" / "ops").iterdir() if (p / "op.py").exists())
TINY = harness.Setup(shapes=("tiny",), rounds=1, limit=0.2)


def test_every_op_has_a_benchmark() -> None:
    assert harness.ops() == OPS


@pytest.mark.parametrize("op", OPS)
def test_each_case_is_right_and_timed(op: str, tmp_path: Path) -> None:
    """On the reference, which every op has, and on what is compiled; with every rival but compiled ones."""
    table = tmp_path / "rows.csv"
    compiled = harness.run(harness.cases(op, TINY), TINY)
    setup = dataclasses.replace(TINY, backends=("reference",))
    outcome = harness.run(harness.cases(op, setup), setup, table=table)
    assert not outcome.wrong
    assert not compiled.wrong
    assert len(outcome.rows) == len(list(harness.cases(op, setup)))
    assert bool(compiled.rows) != bool(compiled.passed_by)
    assert all(float(row["p50_ms"]) > 0 for row in outcome.rows)
    assert any(
        row[f"x_{name.replace(' ', '_')}"] for row in outcome.rows for name in harness.RIVALS
    )
    assert figures.read(table) == outcome.rows
    assert f"## {op}" in figures.markdown(outcome.rows)


def test_rivals_compute_the_same() -> None:
    setup = dataclasses.replace(TINY, dtypes=(torch.float32,), compiled=True)
    case = next(c for c in harness.cases("masked_linear", setup) if c.shape == "N16 K64 B6")
    contest = case.prepare()
    want = contest.ours("reference", 0)
    assert isinstance(want, torch.Tensor)
    same = contest.rivals.keys() - {"dense"}
    assert {"compile", "compile packed", "prune", "eager bool"} <= same
    with torch.no_grad():
        for name in same:
            torch.testing.assert_close(contest.rivals[name](1), want)
    torch.compiler.reset()


def test_what_is_wrong_is_not_timed() -> None:
    def refuse(backend: str) -> None:
        raise AssertionError(f"{backend} is off by one")

    def never(*_: object) -> None:
        raise RuntimeError("timed")

    case = harness.Case(
        "pack", torch.bool, "n1", 0.5, 1, lambda: harness.Contest(refuse, never, {"dense": never})
    )
    said: list[str] = []
    outcome = harness.run([case], dataclasses.replace(TINY, backends=("reference",)), said.append)
    assert not outcome.rows
    assert outcome.wrong == ["pack bool n1 density 0.5: reference is off by one"]
    assert said == ["WRONG, not timed: pack bool n1 density 0.5: reference is off by one"]


def test_what_no_back_end_takes_is_passed_by_in_one_line() -> None:
    setup = dataclasses.replace(TINY, backends=("triton",))
    said: list[str] = []
    outcome = harness.run(harness.cases("masked_linear", setup), setup, said.append)
    if _backend.missing("triton") is None:
        pytest.skip("Triton runs here")
    assert not outcome.rows
    assert len(said) == len(outcome.passed_by) == 1
    assert "cannot be used" in said[0]


def test_cases_behind_the_limit_are_named() -> None:
    outcome = harness.run(harness.cases("pack", TINY), TINY, until=0.0)
    assert outcome.left_out == [
        "pack bool n4099 density 0.5",
        "pack float32 n4099 density 0.5",
    ]


def test_turns_count_every_contestant_and_drop_the_first_round() -> None:
    seen: list[int] = []
    times, uncaptured = timing.seconds(
        {"a": seen.append, "b": lambda i: None}, torch.device("cpu"), 5, "wall", 9.0, 3
    )
    assert seen == list(range(18))
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5}
    assert uncaptured == []


def test_networks_have_their_parameters() -> None:
    known = {
        "resnet18": (62, 11_689_512),
        "resnet50": (161, 25_557_032),
        "vit-b": (152, 86_567_656),
    }
    for name, sizes in shapes.parameters(tuple(known), ()):
        assert (len(sizes), sum(sizes)) == known[name]


def test_shapes_by_name_and_by_size() -> None:
    assert list(shapes.linear(("5x7x2",), "cpu")) == [(5, 7, 2)]
    assert (4096, 4096, 1) in set(shapes.linear(("default",), "cuda"))
    assert (128256, 4096, 4096) in set(shapes.linear(("all",), "cpu"))
    assert (64, 64, 3, 56, 1, 256) in set(shapes.conv(("resnet18",), "cpu"))
    for wrong in (shapes.linear, shapes.conv, shapes.counts, shapes.parameters):
        with pytest.raises(ValueError, match="got 'nope'"):
            list(wrong(("nope",), ()))  # type: ignore[operator]


def test_unpacked_in_plain_torch() -> None:
    from fastmask import ops

    keep = torch.rand(3, 16) < 0.5
    want = torch.where(keep, 1.0, 0.0)
    assert torch.equal(rivals.unpacked(torch.ones(3, 16), ops.pack(keep)), want)


def test_command_and_figure(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    run = CliRunner().invoke(
        app,
        ["bench", "masked_linear", "popcount", "--shapes", "tiny", "--rounds", "1", "--device", "cpu",
         "--csv", str(table)],
        env={"COLUMNS": "120"},
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "masked_linear, cpu, float32" in run.output or _backend.missing("cpu")
    drawn = CliRunner().invoke(app, ["bench", "--from", str(table)])
    assert drawn.exit_code == 0, drawn.output
    pytest.importorskip("matplotlib")
    for suffix in ("", "-roofline"):
        assert any((tmp_path / f"mine{suffix}{end}").exists() for end in (".md", ".svg"))
    assert (tmp_path / "mine-roofline.png").stat().st_size > 10_000
    table.write_text("op\npack\n")
    refused = CliRunner().invoke(app, ["bench", "--from", str(table)])
    assert refused.exit_code == 2
    assert "not a table of this version" in refused.output


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "op: expected one of compressed_linear"),
        (["pack", "--shapes", "nope"], "got 'nope'"),
        (["pack", "--dtype", "int8"], "--dtype: expected one of float32"),
        (["pack", "--backend", "tpu"], "--backend: expected one of reference"),
        (["pack", "--device", "nope"], "--device: nope"),
        (["pack", "--malloc", "fast"], "--malloc: expected default or tuned"),
    ],
)
def test_refusals_of_the_command(arguments: list[str], said: str) -> None:
    run = CliRunner().invoke(app, ["bench", *arguments])
    assert run.exit_code == 2
    assert said in run.output


def test_the_command_lists_cases_and_times_nothing() -> None:
    run = CliRunner().invoke(app, ["bench", "--list", "--shapes", "default", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "masked_linear float32 N4096 K4096 B8 S8 density 0.5" in run.output.splitlines()
    assert "learned_linear float32 N4096 K4096 B64 S4 density 0.5" in run.output.splitlines()


def test_programs_are_in_what_is_installed(tmp_path: Path) -> None:
    """As a wheel has them: copied beside the package's own modules, with no checkout around."""
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    run = subprocess.run(
        [sys.executable, "-m", "fastmask", "bench", "pack", "--list", "--device", "cpu"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.stdout.splitlines()[0] == "pack bool n16777216 density 0.5", run.stderr


def test_the_sweep_is_compared_and_timed() -> None:
    program = ROOT / "benchmarks" / "bench_transfer_sweep.py"
    small = ("--features", "24", "--classes", "3", "--repeats", "1")
    done = subprocess.run(
        [sys.executable, program, *small], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "every run's accuracies agree within one test row" in done.stdout
    assert re.search(r"grouped over the loop: \d+\.\d times", done.stdout)


def test_the_transfer_study_has_the_same_accuracies_on_the_engine() -> None:
    if _backend.missing("cpu") is not None:
        pytest.skip(f"no CPU engine: {_backend.missing('cpu')}")
    program = ROOT / "benchmarks" / "bench_transfer_backends.py"
    done = subprocess.run(
        [sys.executable, program, "--repeats", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"accuracies at most [01] of 240 test images apart", done.stdout)


def suite(*options: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / "benchmarks" / "gpu_suite.py"
    return subprocess.run(
        [sys.executable, program, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_gpu_suite_runs_dry(tmp_path: Path) -> None:
    """All its stages but the build, on the CPU: the machinery works before a GPU is met."""
    done = suite("--dry-run", "--no-build", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "summary.md").read_text()
    for stage, state in (
        ("verify", "ok"),
        ("tests", "ok"),
        ("memcheck", "left out"),
        ("benchmarks", "ok"),
    ):
        assert f"| {stage} | {state} |" in said, said
    assert {row["op"] for row in figures.read(tmp_path / "results.csv")} <= set(OPS)
    assert not list(tmp_path.glob("*.log"))
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_suite_refuses_a_machine_without_one(tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path))
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr


def test_what_the_gpu_suite_takes_for_wrong() -> None:
    from fastmask._benchmarks import gpu_suite as it

    assert it.judged(0, "3 passed")[0] == it.GOOD
    assert it.judged(1, "1 failed")[0] == it.WRONG
    assert it.judged(-1, "....s.  [ 3%]\n")[0] == it.LEFT
    assert it.judged(-1, "..F.s.  [ 3%]\n")[0] == it.WRONG
    assert it.judged_sanitizer(0, "== ERROR SUMMARY: 0 errors\n") == (
        it.GOOD,
        "ERROR SUMMARY: 0 errors",
    )
    assert it.judged_sanitizer(99, "== ERROR SUMMARY: 2 errors\n")[0] == it.WRONG
    assert it.judged_sanitizer(1, "Error: Device not supported\n")[0] == it.LEFT
    assert it.judged_sanitizer(-1, "")[0] == it.LEFT
    assert it.judged_sanitizer(0, "nothing was run")[0] == it.WRONG
    theirs, ours = (
        "Invalid read\n==  at void at::native::copy<int>(T1)+0x40\n",
        "== at _few+0x1f0\n",
    )
    found = theirs + "== ERROR SUMMARY: 2 errors\n"
    assert it.judged_sanitizer(99, found)[0] == it.GOOD
    assert it.judged_sanitizer(99, ours + found)[0] == it.WRONG
    cpp = (
        "== Race between Write access at fastmask::(anonymous namespace)::few<float>(T1)+0x40 and\n"
    )
    assert it.judged_sanitizer(99, cpp + found)[0] == it.WRONG
    assert it.judged_tests(0, "2300 passed in 60 s")[0] == it.GOOD
    assert it.judged_tests(0, "2300 skipped in 60 s")[0] == it.WRONG
    assert it.judged_tests(0, "SKIPPED [5] needs a CUDA device\n3 passed in 1 s")[0] == it.WRONG


def test_the_gpu_suite_goes_on_behind_a_case_that_ended_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastmask._benchmarks import gpu_suite as it

    ends = {
        "0": (3, '@ {"next": 1, "case": "a"}\n@ {"wrong": ["a: off by one"], "left": []}'),
        "1": (-11, '@ {"next": 2, "case": "b"}\n@ {"next": 3, "case": "c"}'),
        "3": (-1, '@ {"next": 4, "case": "d"}'),
    }
    begun: list[str] = []

    class Ended:
        def __init__(
            self, _: object, log: str, program: str, option: str, first: str, *__: str
        ) -> None:
            begun.append(first)

        def end(self, _: float) -> tuple[int, str]:
            return ends[begun[-1]]

    monkeypatch.setattr(it.Suite, "start", lambda *words: Ended(*words))
    suite = it.Suite(tmp_path, time.monotonic() + 500, True, {})
    it.benchmark(suite)
    assert begun == ["0", "1", "3"]
    (stage,) = suite.stages
    assert stage.state == it.WRONG and stage.said.startswith("0 rows, 2 wrong, 1 cases left out")
    assert "off by one" in stage.said
    assert "| benchmarks | WRONG |" in (tmp_path / "summary.md").read_text()


def test_every_entry_of_the_gpu_plan_has_cases() -> None:
    from fastmask._benchmarks import gpu_cases as it

    for op, sets, dtypes, _ in it.PLAN:
        setup = harness.Setup(
            device=torch.device("cuda"),
            shapes=tuple(sets.split(",")),
            dtypes=tuple(harness.DTYPES[name] for name in dtypes),
        )
        assert next(harness.cases(op, setup), None) is not None, (op, sets)
    assert {op for op, *_ in it.PLAN} == set(OPS)


def test_a_back_end_that_lacks_a_part_is_passed_by() -> None:
    from fastmask.errors import BackendUnavailable

    def lacking(backend: str) -> None:
        if backend == "cpu":
            raise BackendUnavailable("it has no gradients")

    contest = harness.Contest(lacking, lambda b, i: None, {})
    case = harness.Case("pack", torch.bool, "n1", 0.5, 1, lambda: contest)
    said: list[str] = []
    assert list(harness.verified(case, contest, ["cpu", "reference"], said.append)) == ["reference"]
    assert said == ["passed by: pack bool n1 density 0.5: it has no gradients"]
