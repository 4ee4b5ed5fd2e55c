"""Figures and page: complete, self-contained, escaped, and drawn for whatever part of a sweep there is."""

from __future__ import annotations

import os
import re
import stat
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.synthetic_run import DIGITS, PACS, make_run

from fastmask.errors import RunFolderError
from fastmask.report import atomic, canvas, read_run, render
from fastmask.report.figures import drawings
from fastmask.report.headline import headline
from fastmask.report.palette import strategy_colour, wrapped
from fastmask.report.pictures import fold
from fastmask.report.rows import STRATEGIES
from fastmask.report.tables import strategy_table, table_1

pytest.importorskip("matplotlib", reason="figures need the extra `report`")

FIGURES = {
    "figure4_weights",
    "figure5_source_accuracy",
    "figure6_target_accuracy",
    "figure7_masks",
    "knob_beta",
    "knob_tau",
    "mask_alone",
    "mask_overlap",
    "tradeoff",
    "tradeoff_curves",
}
VOID = {"meta", "br", "path", "use", "image", "rect", "line", "circle", "stop"}


class Page(HTMLParser):
    """What a browser would fetch or run, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("pacs") / "run", vary=True)
    render(run)
    return run


def test_every_figure_is_there_twice_and_whole(pacs: Path) -> None:
    files = {path.name for path in (pacs / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    for name in FIGURES:
        assert (pacs / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ET.parse(pacs / "figures" / f"{name}.svg")


def test_page_is_self_contained(pacs: Path) -> None:
    text = (pacs / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in page.fetched)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://", text)
    assert text.count("<svg") == 2 * len(FIGURES)


def test_ids_in_the_page_are_unique_and_found(pacs: Path) -> None:
    text = (pacs / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_published_numbers_stand_beside_pacs_and_nothing_else(pacs: Path, tmp_path: Path) -> None:
    assert "+0.062" in (pacs / "report.html").read_text(encoding="utf-8")
    groups = table_1(read_run(pacs).rows)
    published = {(ln.source, ln.start): ln.published for group in groups for ln in group}
    assert published["sketch", "source-end"].target_change == -0.059  # type: ignore[union-attr]
    mean = published[None, "source-start"]
    assert mean is not None
    assert (mean.source_gain, mean.target_change) == pytest.approx((0.0305, -0.0325))
    run = make_run(tmp_path / "run", domains=("art_painting", "cartoon", "photo"), features=16)
    assert all(ln.published is None for group in table_1(read_run(run).rows) for ln in group)
    said = {
        domains: next(d.caption for d in drawings(read_run(at)) if d.name == "tradeoff_curves")
        for domains, at in (
            ("PACS", pacs),
            ("others", make_run(tmp_path / "c", domains=("a", "b"), features=8, vary=True)),
            ("one source", make_run(tmp_path / "d", sources=PACS[:1], features=8, vary=True)),
        )
    }
    assert [domains for domains, text in said.items() if "Table 1" in text] == ["PACS"]


def test_drawing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    options = {"domains": ("a", "b"), "features": 16, "seeds": 2, "strategies": ("binary",)}
    once, again = (make_run(tmp_path / name / "run", vary=True, **options) for name in "xy")
    for run in (once, again):
        render(run)
    for path in [once / "report.html", *(once / "figures").iterdir()]:
        assert (again / path.relative_to(once)).read_bytes() == path.read_bytes(), path.name


def test_numbers_of_the_page_are_those_of_the_rows(pacs: Path) -> None:
    rows = read_run(pacs).rows
    picked = [r for r in rows if r.strategy == "binary" and r.start == "source-start"]
    line = next(
        ln for ln in strategy_table(rows) if (ln.strategy, ln.start) == ("binary", "source-start")
    )
    # Every source has equally many targets and seeds, so the mean of means is the plain mean.
    assert line.after.mean == pytest.approx(sum(r.source_accuracy for r in picked) / len(picked))
    assert line.density is not None and line.density.mean == pytest.approx(0.83)


HOSTILE = ('<script>alert("1")</script>', "a&b", "$x_{2}$", "[bold]", "très_long_" * 6)


@pytest.mark.parametrize(
    "options",
    [
        {"domains": DIGITS[1:], "classes": tuple("0123456789"), "features": 128, "seeds": 2},
        {"sources": PACS[:1], "seeds": 1, "mask_table": False},
        {"strategies": ("naive",), "baselines": ("none",), "starts": ("source-end",)},
        {"strategies": ("editor", "naive"), "baselines": ("scratch",), "seeds": 2},
        {"strategies": (), "seeds": 1},
        {"keep": 0.0},
        {"classes": tuple(f"class_{i}" for i in range(65)), "hidden": 24, "seeds": 2},
        {"classes": ("only",), "features": 1},
        {"vary": True, "seeds": 1, "strategies": ("binary",)},
        {"vary": True, "sources": PACS[:1], "keep": 0.5},
        {"vary": True, "baselines": (), "seeds": 1},
        {"vary": True, "mask_table": False, "strategies": ("kl", "lowrank", "random")},
    ],
    ids=lambda options: "-".join(options),
)
def test_draws_whatever_there_is(
    tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Coarse pictures: what can fail is the drawing, and fine ones take longer.
    monkeypatch.setattr(canvas, "PNG_DPI", 20)
    run = make_run(tmp_path / "run", **{"features": 64, "domains": PACS[:2], **options})
    text = render(run).read_text(encoding="utf-8")
    assert not Page(text).open
    folder = read_run(run)
    done = len(folder.rows) + len(folder.varied)
    if done < (folder.planned or 0):
        assert f"{done} of {folder.planned} runs" in text
        assert "incomplete" in text
    else:
        assert "incomplete" not in text
    if options.get("seeds") == 1:
        assert "1 seed" in text
        assert "confidence" not in text
    compared = "none" in options.get("baselines", ("none",))
    if options.get("vary") and compared:
        assert "The trade-off as knobs vary" in text and "The same in numbers" in text
        assert "with a knob varied, are in results.csv" in text
    else:
        assert "The trade-off as knobs vary" not in text
    assert ("What the mask alone knows" in text) is (
        options.get("mask_table", True) and bool(options.get("strategies", True))
    )


def test_all_text_is_escaped(tmp_path: Path) -> None:
    domains = tuple(HOSTILE[i].replace("/", "") for i in (0, 1, 4))
    run = make_run(
        tmp_path / "run", domains=domains, classes=HOSTILE, features=16, seeds=1, starts=("random",)
    )
    text = render(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and "script" not in page.tags
    assert "&lt;script&gt;" in text and "a&amp;b" in text
    for path in (run / "figures").glob("*.svg"):
        ET.parse(path)


def test_weights_that_are_all_equal_and_masks_all_of_one_kind(tmp_path: Path) -> None:
    import numpy as np

    from fastmask.report.mask_file import MaskFile
    from fastmask.report.pictures import mask_pictures, weight_histograms

    class Flat(MaskFile):
        def weight(self, name: str) -> np.ndarray:
            return np.full(self.shapes[name], 0.5, np.float32)

        def frozen(self, name: str) -> np.ndarray:
            return np.ones(self.shapes[name], bool)

    mask = Flat(tmp_path, "a", "binary", 0, {"w": (2, 5)}, ("x", "y"))
    for narrow in (False, True):
        bars = weight_histograms([mask], narrow)
        bars.draw_without_rendering()
        assert sum(bar.get_height() for ax in bars.axes for bar in ax.patches) > 0
        picture = mask_pictures([mask], narrow)
        picture.draw_without_rendering()
        (image,) = (image for ax in picture.axes for image in ax.images)
        pixels = np.asarray(image.get_array()).reshape(-1, 4)
        assert len(np.unique(pixels[pixels[:, 3] > 0], axis=0)) == 1, "all frozen, one colour"


def test_naive_rule_is_drawn_with_its_own_k(pacs: Path) -> None:
    from dataclasses import replace

    from fastmask.report.pictures import weight_histograms

    folder = read_run(pacs)
    for k, share in ((1.0, "31.7"), (2.0, "4.6")):
        with_k = replace(folder, config={**folder.config, "naive_k": k})
        caption = next(d.caption for d in drawings(with_k) if d.name == "figure4_weights")
        assert share in caption
    mask = folder.any_mask("photo")
    assert mask is not None
    values = mask.weight(mask.last)
    beyond = abs(values - values.mean()) > 2 * values.std(ddof=1)
    figure = weight_histograms([mask], False, 2.0)
    assert f"naive freezes {100 * beyond.mean():.1f} %" in figure.axes[0].get_xlabel()


def test_headline_says_what_the_numbers_say(pacs: Path, tmp_path: Path) -> None:
    said = headline(read_run(pacs).rows)
    assert said[0].endswith("in 4 of 4 sources.")
    assert said[1].startswith("Its mean lead in source accuracy over the nearest, naive, is +4.")
    assert "points higher" in said[2] and "points lower" in said[2] and "12 pairs" in said[2]
    alone = make_run(tmp_path / "a", strategies=("naive",), seeds=1, sources=PACS[:1], features=16)
    said = headline(read_run(alone).rows)
    assert "naive mask" in said[0] and "one seed" in said[0] and "binary" not in " ".join(said)
    bare = make_run(tmp_path / "b", baselines=(), features=16, seeds=1)
    assert "no unmasked fine-tuning" in " ".join(headline(read_run(bare).rows))
    assert headline([]) == ["No run has finished yet."]


def test_captions_name_every_drawing(pacs: Path) -> None:
    for drawing in drawings(read_run(pacs)):
        assert drawing.name in FIGURES and len(drawing.caption) > 80 and drawing.alt


@pytest.mark.parametrize("n", [1, 2, 37, 128, 175, 1280, 2048])
def test_folding_keeps_every_entry_in_order(n: int) -> None:
    import numpy as np

    row = np.random.default_rng(n).random((2, n)) < 0.5
    folded = fold(row)
    for tile, given in zip(folded.tiles, row, strict=True):
        flat = tile.ravel()
        assert np.array_equal(flat[:n], given) and (flat[n:] == -1).all()
        assert tile.shape == (folded.height, folded.width)
    if n >= 37:
        assert 0.45 < folded.height / folded.width <= 1.0


def test_names_are_broken_where_they_may_be() -> None:
    assert wrapped("art_painting", 12) == "art_painting"
    assert wrapped("rotated_and_thickened_outlines", 18) == "rotated_and_\nthickened_outlines"
    assert wrapped("x" * 30, 10, 2) == "x" * 10 + "\n" + "x" * 9 + "…"
    assert wrapped("", 8) == ""
    assert len({strategy_colour(name) for name in STRATEGIES}) == len(STRATEGIES)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    atomic.write(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFolderError, match="file: cannot be written"):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
