"""Confidence intervals, what is within noise, and the words for it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.synthetic_run import PACS, make_run

from fastmask.cli.summary import as_json
from fastmask.report.headline import headline
from fastmask.report.html_tables import difference, strategies_html, table_1_html
from fastmask.report.metrics import Spread, mean_source_gain, spread
from fastmask.report.noise import listed, noise
from fastmask.report.rows import Row
from fastmask.report.student import t_quantile
from fastmask.report.terminal_tables import strategies_text, table_1_text


def test_quantiles_in_closed_form() -> None:
    # One degree: P(|T| <= t) = 2 atan(t) / pi. Two: t / sqrt(2 + t^2). A few roundings of 2^-53, times at
    # most 20, since 2 t f(t) >= 0.049 at these levels: dt / t = dP / (2 t f(t)).
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-13)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-13)
    assert t_quantile(1, 0.5) == pytest.approx(1.0, rel=1e-15)


def test_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is what quantiles are compared with")
    for degrees in (*range(1, 41), 100, 101, 999):
        for level in (0.5, 0.9, 0.95, 0.99):
            ours, theirs = t_quantile(degrees, level), float(stats.t.ppf((1 + level) / 2, degrees))
            # The sum rounds 3 times a term, degrees / 2 terms; dt / t = dP / (2 t f(t)), and scipy errs too.
            slope = 2 * theirs * float(stats.t.pdf(theirs, degrees))
            assert ours == pytest.approx(theirs, rel=2 * (3 * degrees + 8) * 2**-53 / slope)


@pytest.mark.parametrize("degrees, level", [(0, 0.95), (2, 0.0), (2, 1.0)])
def test_quantiles_that_do_not_exist_are_refused(degrees: int, level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        t_quantile(degrees, level)


def test_interval_by_hand() -> None:
    # Mean 0.02, std 0.01, three seeds: half a width is 4.302653 * 0.01 / sqrt(3).
    low, high = spread([0.01, 0.02, 0.03]).ci95 or (math.nan, math.nan)
    assert (low, high) == pytest.approx((0.02 - 0.0248414, 0.02 + 0.0248414), abs=1e-7)
    assert spread([0.01, 0.02, 0.03]).within_noise is True
    assert spread([0.019, 0.02, 0.021]).within_noise is False
    assert spread([-0.019, -0.02, -0.021]).within_noise is False
    assert spread([0.0, 0.0]).within_noise is True
    assert spread([0.3]).ci95 is None and spread([0.3]).within_noise is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_interval_is_that_of_a_paired_t_test(values: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is what intervals are compared with")
    if np.ptp(values) < 1e-6:  # the roundings of a sum would be all there is to compare
        return
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    # Sums of at most eight values up to 1, times t(1) = 12.7.
    assert spread(values).ci95 == pytest.approx((theirs.low, theirs.high), abs=1e-13)


def rows(gains: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Per strategy the (gain, change) of each seed; two pairs, one up and one down by as much."""
    found = []
    for seed in range(max(map(len, gains.values()))):
        for target, shift in (("b", 0.1), ("c", -0.1)):
            found.append(Row("a", target, "none", "source-end", seed, 0.0, 0.5, 0.5, 0.9))
            for name, values in gains.items():
                if seed < len(values):
                    gain, change = values[seed]
                    found.append(
                        Row("a", target, name, "source-start", seed, 0.5, 0.5 + gain + shift,
                            0.5 + change, 0.9)
                    )  # fmt: skip
    return found


CLEAR, NOISY = (
    [(0.10, -0.02), (0.11, -0.021), (0.12, -0.02)],
    [(0.1, 0.0), (-0.1, 0.1), (0.02, -0.1)],
)


def test_pairs_of_a_seed_are_no_replicates() -> None:
    # The two pairs differ by 0.2, the seeds hardly: counted as six replicates this would be noise.
    gain = mean_source_gain(rows({"binary": CLEAR}), "binary")
    assert gain is not None and gain.n == 3 and gain.within_noise is False
    assert gain.std == pytest.approx(0.01)


def test_words_name_what_is_within_noise() -> None:
    (said,) = noise(rows({"binary": CLEAR, "naive": NOISY}))
    assert "over 3 seeds: the source gain of naive; the target change of naive." in said
    assert "The other differences" in said and "binary" not in said
    (said,) = noise(rows({"binary": CLEAR}))
    assert said.startswith("No difference is within noise")
    (said,) = noise(rows({"naive": NOISY}))
    assert said.endswith("No difference to unmasked fine-tuning is beyond it.")
    assert noise(rows({"binary": CLEAR}))[0] in headline(rows({"binary": CLEAR}))
    assert (
        noise([]) == [] and noise([r for r in rows({"naive": NOISY}) if r.strategy != "none"]) == []
    )


def test_with_one_seed_nothing_can_be_said() -> None:
    one = rows({"binary": CLEAR[:1], "naive": NOISY[:1]})
    assert noise(one)[0].startswith("With one seed nothing can be said")
    assert noise(one)[0] in headline(one)
    mixed = noise(rows({"binary": CLEAR, "naive": NOISY[:1]}))
    assert mixed[1] == "Of naive, with one seed, nothing can be said."
    assert "95" not in strategies_html(one) and "noise" not in strategies_html(one)


def test_seeds_on_other_pairs_are_said_to_be() -> None:
    given = rows({"binary": CLEAR})
    assert len(noise(given)) == 1
    assert "Not all seeds" in noise([r for r in given if (r.target, r.seed) != ("c", 2)])[-1]


def test_starts_are_told_apart() -> None:
    from dataclasses import replace

    given = rows({"binary": CLEAR})
    noisy = rows({"binary": NOISY})
    given += [replace(row, start="random") for row in noisy if row.strategy == "binary"]
    assert "the source gain of binary from random" in noise(given)[0]


def test_lists_of_names() -> None:
    assert [listed(list(names)) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def words(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_cells_show_mean_spread_interval_and_noise() -> None:
    assert difference(None) == "–" and difference(Spread(-0.0001, None, 1)) == "+0.000"
    assert difference(Spread(0.0314, None, 1)) == "+0.031"
    cell = difference(spread([0.01, 0.02, 0.03]))
    assert (
        "+0.020" in cell
        and "±\u00a00.010" in cell
        and words(cell).endswith("−0.005 to +0.045 · noise")
    )
    assert "noise" not in difference(spread([0.019, 0.02, 0.021]))


def plain(table: object) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def test_tables_show_intervals() -> None:
    given = rows({"binary": CLEAR, "naive": NOISY})
    text = plain(strategies_text(given))
    assert "[+0.085, +0.135]" in text and "~ [" in text and "within noise" in text
    page = words(strategies_html(given))
    assert "+0.085 to +0.135" in page and "· noise" in page
    assert "+0.085 to +0.135" in words(table_1_html(given))
    assert "~" not in plain(table_1_text(given))
    text = plain(table_1_text(rows({"binary": NOISY})))
    assert "~ +0.007" in text and "within noise" in text
    assert "confidence" not in plain(strategies_text(rows({"binary": CLEAR[:1]})))


def test_json_holds_intervals(tmp_path: Path) -> None:
    said = as_json(make_run(tmp_path / "run", domains=PACS[:2], features=8, vary=True), None)
    varied = {(line["strategy"], line["setting"]): line for line in said["varied"]}
    assert len(varied) == 24 and "ci95" in varied["binary", "beta=0.3"]["source_gain"]
    assert said["runs"] == said["planned_runs"] == 14 * 3 + 24 * 2 * 3
    binary = next(line for line in said["strategies"] if line["strategy"] == "binary")
    low, high = binary["source_gain"]["ci95"]
    assert low < binary["source_gain"]["mean"] < high
    assert binary["source_gain"]["within_noise"] is (low <= 0 <= high)
    assert "ci95" in said["table_1"][0]["target_change"] and "ci95" not in binary["target_accuracy"]
    said = as_json(make_run(tmp_path / "one", domains=PACS[:2], features=8, seeds=1), None)
    assert said["varied"] == []
    binary = next(line for line in said["strategies"] if line["strategy"] == "binary")
    assert binary["source_gain"]["ci95"] is None and binary["source_gain"]["within_noise"] is None
