"""The results table: gains are those of the accuracies in results.csv, and names and order carry nothing."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from dataclasses import astuple, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.report import metrics
from fastmask.report.rows import COLUMNS, Row, read_rows
from fastmask.report.tables import strategy_table, table_1

DOMAINS = ("a", "b", "c", "d")
KINDS = (
    ("none", "source-end"),
    ("binary", "source-start"),
    ("binary", "random"),
    ("naive", "random"),
)
# Shares of a test part of 128 pictures: floats hold them and their differences exactly.
SHARES = st.integers(0, 128).map(lambda n: n / 128)


@st.composite
def sweeps(draw: st.DrawFn) -> list[Row]:
    """Rows of a sweep of up to four domains, some of them missing as after an interruption."""
    keys = [
        (source, target, strategy, start, seed)
        for source in DOMAINS
        for target in DOMAINS
        if source != target
        for strategy, start in KINDS
        for seed in range(3)
    ]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=60, unique=True))
    return [Row(*key, *(draw(SHARES) for _ in range(4))) for key in chosen]


Gains = dict[str, dict[int, Fraction]]


def recomputed(rows: list[Row], strategy: str, start: str, value: str) -> Gains:
    """source -> seed -> the mean over targets of paired differences, in exact arithmetic."""
    base = {(r.source, r.target, r.seed): r for r in rows if r.strategy == "none"}
    cells: dict[tuple[str, int], list[Fraction]] = defaultdict(list)
    for r in rows:
        key = (r.source, r.target, r.seed)
        if (r.strategy, r.start) == (strategy, start) and key in base:
            difference = Fraction(getattr(r, value)) - Fraction(getattr(base[key], value))
            cells[r.source, r.seed].append(difference)
    found: Gains = defaultdict(dict)
    for (source, seed), differences in cells.items():
        found[source][seed] = sum(differences) / len(differences)
    return found


def over_sources(gains: Gains) -> list[Fraction]:
    """The mean over sources of each seed that any source has."""
    seeds = {seed for by_seed in gains.values() for seed in by_seed}
    rows = [[by_seed[seed] for by_seed in gains.values() if seed in by_seed] for seed in seeds]
    return [sum(row) / len(row) for row in rows]


def agrees(got: metrics.Spread, values: list[Fraction]) -> None:
    # Differences of shares are exact; a mean of means is rounded three times at numbers of at most 1, and a
    # deviation of such means moves by no more than they do, times the sqrt(n / (n - 1)) <= sqrt(2).
    close = 8 * sys.float_info.epsilon
    mean = sum(values) / len(values)
    assert got.n == len(values) and abs(got.mean - mean) <= close
    if len(values) == 1:
        assert got.std is None
    else:
        square = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        assert got.std is not None and abs(got.std - float(square) ** 0.5) <= close


@given(sweeps())
@settings(max_examples=40)
def test_the_tables_hold_what_the_csv_gives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    path: Path = tmp_path_factory.mktemp("run") / "results.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(astuple(row) for row in rows)])
    read = read_rows(path)
    assert read == rows
    for group in table_1(read):
        for line in group:
            for value, got in (("source_accuracy", line.gain), ("target_accuracy", line.change)):
                gains = recomputed(rows, "binary", line.start, value)
                mean = line.source is None
                agrees(got, over_sources(gains) if mean else [*gains[line.source].values()])
    shown = {(line.source, line.start) for group in table_1(read) for line in group}
    for _, start in KINDS[1:3]:
        expected = set(recomputed(rows, "binary", start, "source_accuracy"))
        assert {source for source, at in shown if at == start and source is not None} == expected
    for line in strategy_table(read):
        mine = [r for r in rows if (r.strategy, r.start) == (line.strategy, line.start)]
        assert line.after.n == len({r.seed for r in mine})
        for value, gained in (("source_accuracy", line.gain), ("target_accuracy", line.change)):
            gains = recomputed(rows, line.strategy, line.start, value)
            # The baseline against itself is no gain; without a baseline there is none.
            if line.strategy == "none" or not gains:
                assert gained is None
            else:
                assert gained is not None
                agrees(gained, over_sources(gains))


def lines(rows: list[Row]) -> dict[Any, Any]:
    """Both tables, without the order of their lines."""
    first = {
        (line.source, line.start): (line.gain, line.change, line.best_gain, line.best_change)
        for group in table_1(rows)
        for line in group
    }
    return first | {("strategy", line.strategy, line.start): line for line in strategy_table(rows)}


@given(sweeps(), st.permutations(DOMAINS), st.permutations(range(3)), st.randoms())
@settings(max_examples=40)
def test_other_names_other_seeds_and_another_order_permute_the_lines_and_no_number(
    rows: list[Row], names: list[str], seeds: list[int], random: Any
) -> None:
    """Sums are rounded once (fsum), so that even their last bit does not depend on the order."""
    new = dict(zip(DOMAINS, names, strict=True))
    renamed = [
        replace(r, source=new[r.source], target=new[r.target], seed=seeds[r.seed] + 10)
        for r in rows
    ]
    random.shuffle(renamed)
    expected = {
        (new.get(key[0], key[0]), *key[1:]) if len(key) == 2 else key: value
        for key, value in lines(rows).items()
    }
    assert lines(renamed) == expected
