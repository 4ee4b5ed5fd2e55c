"""Trade-off curves, overlap of masks, and what masks hold alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.synthetic_run import PACS, make_run

from fastmask.errors import MaskFileError
from fastmask.report import RunFolder, metrics, read_run
from fastmask.report.curves import curves, knob_label, of_masks, own_points, own_value
from fastmask.report.mask_file import MaskFile
from fastmask.report.mask_rows import MaskRow
from fastmask.report.overlap import overlap, overlaps
from fastmask.report.paper import published, published_mean


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("varied") / "run", features=16, vary=True)
    return read_run(run)


def test_curves_are_in_order_of_strategy_knob_and_value(varied: RunFolder) -> None:
    found = curves(varied)
    assert [(curve.strategy, curve.knob) for curve in found] == [
        ("naive", "naive_k"), ("editor", "editor_share"),
        ("binary", "beta"), ("binary", "density"), ("binary", "tau"),
    ]  # fmt: skip
    assert [point.value for point in found[2].points] == [0.1, 0.3, 1.0, 3.0]
    assert [point.setting for point in found[2].points] == [
        "beta=0.1",
        "beta=0.3",
        "beta=1",
        "beta=3",
    ]
    assert curves(replace(varied, varied=())) == []


def test_points_are_differences_to_the_unmasked_runs(varied: RunFolder) -> None:
    point = next(p for c in curves(varied) for p in c.points if p.setting == "beta=0.3")
    base = {(r.source, r.target, r.seed): r for r in varied.rows if r.strategy == "none"}
    mine = [r for r in varied.varied if r.setting == "beta=0.3"]
    gains = [r.source_accuracy - base[r.source, r.target, r.seed].source_accuracy for r in mine]
    changes = [r.target_accuracy - base[r.source, r.target, r.seed].target_accuracy for r in mine]
    # Equally many targets and seeds: the mean of means is the plain mean, up to roundings of a sum.
    assert len(mine) == 36 and point.gain.n == 3
    assert point.gain.mean == pytest.approx(sum(gains) / 36, abs=1e-14)
    assert point.change.mean == pytest.approx(sum(changes) / 36, abs=1e-14)
    assert curves(replace(varied, rows=())) == []


def test_own_points_are_those_of_the_strategy_table(varied: RunFolder) -> None:
    points = own_points(varied)
    assert [point.strategy for point in points] == ["naive", "editor", "binary"]
    assert points[2].gain == metrics.mean_source_gain(varied.rows, "binary")
    assert math.isnan(points[2].value)


def test_own_value_is_known_where_its_settings_lie_on_the_curve(varied: RunFolder) -> None:
    assert own_value(varied, "tau") == 1.0
    assert own_value(varied, "beta") is None, "the sweep froze a share, a varied beta does not"
    assert own_value(replace(varied, config={**varied.config, "density": None}), "beta") == 1.0
    assert own_value(replace(varied, config={}), "tau") is None
    assert knob_label("mask_steps") == "mask steps"


def test_figures_of_masks_count_each_source_once() -> None:
    rows = [
        MaskRow("a", "binary", 0, "", 0.5, 0.4, 0.9, 0.8, 0.1),
        MaskRow("b", "binary", 0, "", 0.5, 0.6, 0.9, 0.6, 0.1),
        MaskRow("a", "binary", 1, "", 0.5, 0.8, 0.9, 0.9, 0.1),
        MaskRow("a", "naive", 1, "", 0.5, None, 0.9, 0.9, 0.1),
        MaskRow("a", "binary", 1, "beta=1", 0.5, 0.1, 0.9, 0.9, 0.1),
    ]
    share = of_masks(rows, "binary", "", lambda row: row.positive_share)
    assert share is not None and (share.mean, share.n) == (pytest.approx(0.65), 2)
    assert of_masks(rows, "naive", "", lambda row: row.positive_share) is None
    assert of_masks(rows, "naive", "", lambda row: row.kept_accuracy) == metrics.Spread(
        0.9, None, 1
    )


def test_overlap_by_hand() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    # One of three; p = q = 1/2: chance is (1/4) / (3/4).
    assert overlap(a, b).overlap == pytest.approx(1 / 3)
    assert overlap(a, b).chance == pytest.approx(1 / 3)
    assert overlap(a, b).beyond_chance == pytest.approx(0.0)
    assert overlap(a, a).overlap == 1.0 and overlap(a, a).beyond_chance == 1.0
    none, full = np.zeros(4, bool), np.ones(4, bool)
    assert overlap(none, a).overlap == 0.0 and overlap(none, a).chance == 0.0
    assert overlap(none, none).overlap == 1.0 and overlap(none, none).beyond_chance == 0.0
    assert overlap(full, full).beyond_chance == 0.0, "two full masks agree by chance alone"


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.98), st.floats(0.02, 0.98))
def test_chance_is_what_independent_masks_share(seed: int, p: float, q: float) -> None:
    rng = np.random.default_rng(seed)
    n = 40_000
    a, b = rng.random(n) < p, rng.random(n) < q
    found = overlap(a, b)
    k, m, either = a.sum(), b.sum(), (a | b).sum()
    # Given the counts k and m, |a and b| is hypergeometric, and d(overlap) / d|a and b| is
    # (k + m) / |a or b|^2 <= 2 / |a or b|. Seven deviations, and eight entries for the tail of small counts:
    # less than one failure in 10^9 draws.
    deviation = math.sqrt(k / n * m / n * (1 - k / n) * (1 - m / n) * n * n / (n - 1))
    assert abs(found.overlap - found.chance) < 2 / either * (7 * deviation + 8)


class Held(MaskFile):
    """A mask file whose bits are known."""

    def frozen(self, name: str) -> np.ndarray:
        return np.array([int(bit) for bit in self.path.name], bool).reshape(self.shapes[name])


def held(bits: str, source: str, seed: int, shape: tuple[int, ...] = (2, 2)) -> MaskFile:
    return Held(Path(bits), source, "binary", seed, {"w": shape}, ("x", "y"))


def test_overlaps_between_domains_and_from_seed_to_seed() -> None:
    masks = {
        ("a", "binary", 0): held("1100", "a", 0),
        ("a", "binary", 1): held("1010", "a", 1),
        ("b", "binary", 0): held("1100", "b", 0),
        ("b", "binary", 1): held("0101", "b", 1),
    }
    (found,) = overlaps(masks)
    assert found.sources == ("a", "b")
    assert found.cells["a", "b"].overlap == pytest.approx((1 + 0) / 2)
    assert found.cells["a", "b"] == found.cells["b", "a"]
    assert found.cells["a", "a"].overlap == pytest.approx(1 / 3)
    same = found.mean(same=True)
    assert same is not None and same.overlap == pytest.approx(1 / 3)
    one = {key: mask for key, mask in masks.items() if key[2] == 0}
    assert (
        set(overlaps(one)[0].cells) == {("a", "b"), ("b", "a")}
        and overlaps(one)[0].mean(True) is None
    )
    assert overlaps({("a", "binary", 0): held("1100", "a", 0)}) == []
    masks["b", "binary", 1] = held("010111", "b", 1, (2, 3))
    with pytest.raises(MaskFileError, match="expected the shapes"):
        overlaps(masks)


def test_published_means_are_those_of_the_table() -> None:
    mean = published_mean("source-end")
    assert (mean.source_gain, mean.target_change) == pytest.approx((0.02525, -0.035))
    assert published("source-end", None) == mean and published("nowhere", None) is None
    assert published("random", "Photo") is not None and published("random", PACS[0] + "x") is None


def test_labels_cover_neither_points_nor_each_other() -> None:
    figure_module = pytest.importorskip(
        "matplotlib.figure", reason="figures need the extra `report`"
    )
    from matplotlib.text import Annotation

    from fastmask.report.labels import Label, place

    figure = figure_module.Figure(figsize=(3, 2))
    ax = figure.subplots()
    rng = np.random.default_rng(5)
    points = [(float(x), float(y)) for x, y in rng.random((60, 2))]
    ax.plot(*zip(*points, strict=True), "o")
    figure.draw_without_rendering()
    place(ax, [Label(x, y, f"{x:.2f}") for x, y in points], points)
    texts = [child for child in ax.get_children() if isinstance(child, Annotation)]
    # Crowded enough that some find no place.
    assert 10 < len(texts) < 60 and texts[0].get_text() == f"{points[0][0]:.2f}"
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    marks = ax.transData.transform(points)
    assert not any(box.contains(x, y) for box in boxes for x, y in marks)
    inside = ax.get_window_extent()
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 for b in boxes)


def test_text_is_told_from_its_ground() -> None:
    from fastmask.report.palette import FREE, FROZEN, text_on

    assert text_on("#ffffff") == text_on(FROZEN) == "#101014"
    assert text_on("#000000") == text_on(FREE) == text_on("#0072b2") == "#fafafc"
