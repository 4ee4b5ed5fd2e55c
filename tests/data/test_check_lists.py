"""`data.check` with published lists: what does not fit, what is left out, what is seen and tested on."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmask import data
from fastmask.data import Report
from fastmask.errors import DataError

Write = Callable[[dict[str, dict[str, int]]], Path]
GOOD = {"art": {"dog": 20, "cat": 20}, "photo": {"dog": 20, "cat": 20}}


def named(report: Report) -> dict[str, list[str]]:
    return {found.kind: [str(place) for place in found.places] for found in report.findings}


def loads(folder: Path, splits: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.load(folder, splits=splits)
    except DataError:
        return False
    return True


def lists(place: Path, base: int = 1, **parts: range) -> Path:
    """A list a domain and part, labels counting from `base`."""
    place.mkdir(exist_ok=True)
    for domain in GOOD:
        for part, rows in parts.items():
            lines = [
                f"{domain}/{name}/p{row:02}.png {label}"
                for label, name in enumerate(("cat", "dog"), base)
                for row in rows
            ]
            (place / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.parametrize("base", [0, 1])
def test_lists_that_fit_have_no_findings(pictures: Write, tmp_path: Path, base: int) -> None:
    folder = pictures(GOOD)
    given_lists = lists(tmp_path / "lists", base, train=range(10), test=range(10, 20))
    report = data.check(folder, given_lists)
    assert report.findings == () and report.splits == str(given_lists)
    assert loads(folder, given_lists)


def test_all_faults_of_lists_are_named_at_once(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    place = lists(tmp_path / "lists", train=range(10), test=range(10, 20))
    (place / "photo_test.txt").unlink()
    art = place / "art_train.txt"
    art.write_text(
        art.read_text().replace("p01.png 1", "p99.png 1").replace("p02.png 2", "p02.png")
    )
    (place / "art_test.txt").write_bytes(b"art/dog/\xff.png 1\n")
    (folder / "art/dog/p03.png").write_bytes(b"")
    found = named(data.check(folder, place))
    assert [line.split(" (")[0] for line in found["lists"]] == [
        "art_train.txt:13: expected 'domain/class/file label', got 'art/dog/p02.png'",
        "art_test.txt: cannot be read",
        "photo: no photo_test_kfold.txt and no photo_test.txt",
        "art_train.txt:2: there is no art/cat/p99.png",
    ]
    # A broken file that a list names is a broken file, not a missing one.
    assert found["empty"] == ["art/dog/p03.png: empty file"]
    assert not loads(folder, place)


def test_lists_that_leave_a_class_out_are_an_error(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    place = lists(tmp_path / "lists", train=range(10), test=range(10, 20))
    path = place / "art_test.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "cat" in line))
    found = named(data.check(folder, place))
    assert found["sides"] == ["art/dog: no image in the test part"]
    assert found["in-no-list"] == [f"art/dog/p{row}.png" for row in range(10, 20)]
    assert not loads(folder, place)


def test_copies_across_the_sides_of_lists_are_named(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    shutil.copy(folder / "art/dog/p00.png", folder / "art/dog/p10.png")
    shutil.copy(folder / "art/cat/p01.png", folder / "photo/cat/p11.png")
    place = lists(tmp_path / "lists", train=range(10), test=range(10, 20))
    found = named(data.check(folder, place))
    assert found["copies-listed"] == ["art/dog/p10.png"]
    assert found["copies-sides"] == ["photo/cat/p11.png: trained on as art/cat/p01.png"]
    assert loads(folder, place)
