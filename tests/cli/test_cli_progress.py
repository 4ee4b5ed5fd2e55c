"""Progress: bars where there is a terminal, few lines where there is none, never on standard output."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastmask.cli.progress import Bars, Lines, Silence, duration, meter


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def written(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_the_stream_decides() -> None:
    assert isinstance(meter(console(True), False), Bars)
    assert isinstance(meter(console(False), False), Lines)
    assert isinstance(meter(console(True), True), Silence)


def test_lines_say_begin_end_and_time_left_seldom() -> None:
    now = [0.0]
    out = console(False)
    with Lines(out, lambda: now[0]) as progress:
        for done in range(101):
            progress("fine-tune [photo]", done, 100)
            now[0] += 0.25
    lines = written(out).splitlines()
    assert lines[0] == "fine-tune [photo]: 0/100"
    assert lines[1] == "fine-tune [photo]: 40/100, 15 s left"
    assert lines[2] == "fine-tune [photo]: 80/100, 5 s left"
    assert lines[3] == "fine-tune [photo]: 100/100 done in 25 s"
    assert len(lines) == 4
    assert "\x1b" not in written(out)


def test_lines_say_nothing_twice() -> None:
    out = console(False)
    progress = Lines(out, lambda: 0.0)
    for _ in range(5):
        progress("masks", 3, 3)
    assert written(out).splitlines() == ["masks: 3/3 done in 0 s"]


def test_bars_show_count_and_drop_old_labels() -> None:
    out = console(True)
    with Bars(out) as progress:
        for i in range(20):
            progress(f"stage {i} [x]", 1, 2)
            progress(f"stage {i} [x]", 2, 2)
    last = written(out).rsplit("stage 11", 1)[-1]
    assert "stage 19 [x]" in last and "2/2" in last and "left" in last


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Silence() as progress:
        progress("anything", 0, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
