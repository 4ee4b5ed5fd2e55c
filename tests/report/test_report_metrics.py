"""Gains and changes against numbers worked out by hand, and against a second way of computing them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmask.report import metrics
from fastmask.report.metrics import spread
from fastmask.report.rows import Row


def run(source: str, target: str, strategy: str, seed: int, at: float, reached: float) -> Row:
    start = "source-end" if strategy == "none" else "source-start"
    return Row(source, target, strategy, start, seed, 0.5, at, reached, 0.95)


# Two sources, two targets each, two seeds: every mean below can be done in the head.
ROWS = [
    run("a", "b", "none", 0, 0.50, 0.80),
    run("a", "c", "none", 0, 0.60, 0.70),
    run("a", "b", "none", 1, 0.54, 0.80),
    run("a", "c", "none", 1, 0.60, 0.70),
    run("b", "a", "none", 0, 0.40, 0.90),
    run("b", "a", "none", 1, 0.40, 0.90),
    run("a", "b", "binary", 0, 0.60, 0.78),
    run("a", "c", "binary", 0, 0.64, 0.70),
    run("a", "b", "binary", 1, 0.60, 0.76),
    run("a", "c", "binary", 1, 0.60, 0.70),
    run("b", "a", "binary", 0, 0.38, 0.91),
    run("b", "a", "binary", 1, 0.38, 0.91),
    run("a", "b", "naive", 0, 0.52, 0.80),
    run("b", "a", "naive", 0, 0.40, 0.90),
]


def test_source_gain_by_hand() -> None:
    gain = metrics.source_gain(ROWS, "binary")
    # seed 0: (0.10 + 0.04) / 2 = 0.07; seed 1: (0.06 + 0.00) / 2 = 0.03.
    assert gain["a"].mean == pytest.approx(0.05)
    assert gain["a"].std == pytest.approx(math.sqrt(2 * 0.02**2))
    assert gain["a"].n == 2
    assert gain["b"].mean == pytest.approx(-0.02)
    assert gain["b"].std == pytest.approx(0.0)


def test_target_change_by_hand() -> None:
    change = metrics.target_change(ROWS, "binary")
    # seed 0: (-0.02 + 0) / 2; seed 1: (-0.04 + 0) / 2.
    assert change["a"].mean == pytest.approx(-0.015)
    assert change["b"].mean == pytest.approx(0.01)


def test_mean_over_sources_counts_each_source_once() -> None:
    mean = metrics.mean_source_gain(ROWS, "binary")
    assert mean is not None
    # seed 0: (0.07 - 0.02) / 2 = 0.025; seed 1: (0.03 - 0.02) / 2 = 0.005.
    assert mean.mean == pytest.approx(0.015)
    assert mean.std == pytest.approx(0.02 / math.sqrt(2))


def test_a_run_without_its_baseline_is_left_out() -> None:
    fewer = [row for row in ROWS if row.key != ("a", "b", "none", "source-end", 1, "")]
    pairs = metrics.paired_difference(fewer, "binary", lambda row: row.source_accuracy)
    assert ("a", "b", 1) not in pairs and len(pairs) == 5
    assert metrics.source_gain([r for r in ROWS if r.strategy != "none"], "binary") == {}
    assert metrics.mean_source_gain([], "binary") is None


def test_one_value_has_no_spread_and_none_is_refused() -> None:
    assert spread([0.25]).std is None
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_start_shown_is_the_default_one_where_it_ran() -> None:
    ended = [replace(row, start="source-end") for row in ROWS if row.strategy == "binary"]
    assert metrics.default_start([*ROWS, *ended], "binary") == "source-start"
    assert metrics.default_start(ended, "binary") == "source-end"
    assert metrics.default_start(ROWS, "none") == "source-end"
    assert metrics.default_start(ROWS, "editor") is None


def test_who_keeps_the_source_is_paired_and_a_tie_is_no_win() -> None:
    contest = metrics.keeps_source_best(ROWS)
    # naive ran seed 0 alone: on a, 0.60 against 0.52; on b, 0.38 against 0.40.
    assert (contest.won, contest.compared, contest.rivals) == (("a",), ("a", "b"), ("naive",))
    tie = [replace(row, source_accuracy=0.5) for row in ROWS]
    assert metrics.keeps_source_best(tie).won == ()


def test_binary_must_beat_every_rival() -> None:
    editor = [
        replace(row, strategy="editor", source_accuracy=0.99)
        for row in ROWS
        if row.strategy == "naive" and row.source == "a"
    ]
    contest = metrics.keeps_source_best([*ROWS, *editor])
    assert contest.won == () and contest.compared == ("a", "b")


shares = st.floats(0.0, 1.0)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 2)),
        st.tuples(shares, shares),
        min_size=1,
    )
)
def test_gain_equals_a_plain_computation(cells: dict) -> None:
    rows = []
    for (source, target, seed), (plain, masked) in cells.items():
        rows.append(run(source, target, "none", seed, plain, 0.5))
        rows.append(run(source, target, "binary", seed, masked, 0.5))
    gain = metrics.source_gain(rows, "binary")
    assert set(gain) == {source for source, _, _ in cells}
    for source, value in gain.items():
        by_seed = [
            np.mean([m - p for (s, _, k), (p, m) in cells.items() if (s, k) == (source, seed)])
            for seed in sorted({k for s, _, k in cells if s == source})
        ]
        # Sums of at most nine differences of shares of 1: a few roundings of 2^-53 each.
        assert value.mean == pytest.approx(np.mean(by_seed), abs=1e-14)
        if len(by_seed) > 1:
            assert value.std == pytest.approx(np.std(by_seed, ddof=1), abs=1e-13)


@given(st.permutations(ROWS))
def test_the_order_of_rows_changes_nothing_but_the_order(rows: list[Row]) -> None:
    gain = metrics.source_gain(rows, "binary")
    for source, value in metrics.source_gain(ROWS, "binary").items():
        assert gain[source].mean == pytest.approx(value.mean, abs=1e-15)
