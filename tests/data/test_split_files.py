"""Published lists: PACS's and DomainNet's, and lists that do not fit."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmask import data
from fastmask.data import DomainSet
from fastmask.errors import DataError

Write = Callable[[dict[str, dict[str, int]]], Path]
CLASSES = ("cat", "dog")


@pytest.fixture
def folder(pictures: Write) -> Path:
    return pictures({d: {"dog": 5, "cat": 5} for d in ("art", "photo")})


def lines(domain: str, rows: range, base: int) -> str:
    return "".join(
        f"{domain}/{name}/p{row:02}.png {index + base}\n"
        for index, name in enumerate(CLASSES)
        for row in rows
    )


def write(place: Path, ending: str, base: int, **parts: range) -> Path:
    """One list a domain and part."""
    place.mkdir(exist_ok=True)
    for domain in ("art", "photo"):
        for part, rows in parts.items():
            (place / f"{domain}_{part}{ending}.txt").write_text(lines(domain, rows, base))
    return place


def files_tested(domains: DomainSet, domain: str) -> set[str]:
    return {domains.item(domain, row) for row in domains.split(domain, 0).test.tolist()}


def files_trained(domains: DomainSet, domain: str) -> set[str]:
    return {domains.item(domain, row) for row in domains.split(domain, 0).train.tolist()}


def named(domain: str, rows: range) -> set[str]:
    return {f"{domain}/{name}/p{row:02}.png" for name in CLASSES for row in rows}


def message(folder: Path, lists: Path) -> str:
    with pytest.raises(DataError) as caught:
        data.load(folder, splits=lists)
    return str(caught.value)


def test_domainnet_lists_count_from_zero(folder: Path, tmp_path: Path) -> None:
    domains = data.load(
        folder, splits=write(tmp_path / "lists", "", 0, train=range(3), test=range(3, 5))
    )
    for domain in domains.domains:
        assert files_trained(domains, domain) == named(domain, range(3))
        assert files_tested(domains, domain) == named(domain, range(3, 5))


def test_pacs_tests_on_crossval_where_the_test_list_is_everything(
    folder: Path, tmp_path: Path
) -> None:
    lists = write(
        tmp_path / "lists", "_kfold", 1, train=range(4), crossval=range(4, 5), test=range(5)
    )
    domains = data.load(folder, splits=lists)
    for domain in domains.domains:
        assert files_trained(domains, domain) == named(domain, range(4))
        assert files_tested(domains, domain) == named(domain, range(4, 5))


def test_crossval_is_for_training_where_the_test_list_stands_apart(
    folder: Path, tmp_path: Path
) -> None:
    lists = write(
        tmp_path / "lists", "_kfold", 1, train=range(2), crossval=range(2, 3), test=range(3, 5)
    )
    domains = data.load(folder, splits=lists)
    assert files_trained(domains, "art") == named("art", range(3))
    assert files_tested(domains, "art") == named("art", range(3, 5))


def test_pictures_in_no_list_and_copies_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "art/dog/p00.png", folder / "art/dog/p04.png")
    lists = write(tmp_path / "lists", "", 0, train=range(2), test=range(3, 5))
    with pytest.warns(UserWarning, match="left out") as said:
        domains = data.load(folder, splits=lists)
    assert [str(warning.message) for warning in said] == [
        "art: 2 pictures stand in no list; left out",
        "art: 1 picture stands in the test list with a copy in the training list; left out",
        "photo: 2 pictures stand in no list; left out",
    ]
    assert files_tested(domains, "art") == named("art", range(3, 5)) - {"art/dog/p04.png"}


def test_good_lists_warn_of_nothing(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(folder, splits=write(tmp_path / "lists", "", 0, train=range(3), test=range(3, 5)))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda text: text.replace("p01.png 0", "p09.png 0"), "art_train.txt:2: there is no art/cat/p09"),
        (lambda text: text.replace("p01.png 0", "p01.png 1"), "cat has label 1, but 0 elsewhere"),
        (lambda text: text.replace(" 1\n", " 3\n"), "dog has label 1, but 3 elsewhere"),
        (lambda text: text.replace("p01.png 0", "p01.png"), "art_train.txt:2: expected 'domain/class/file"),
        (lambda text: "", "art_train.txt: the list is empty"),
        (lambda text: "p.png 0\n", "expected a path domain/class/file"),
        (lambda text: text + lines("art", range(4, 5), 0), "stand both in the training and in the test"),
        (lambda text: lines("art", range(3, 5), 0), "the test list repeats the training list"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit(
    folder: Path, tmp_path: Path, spoil: Callable[[str], str], said: str
) -> None:
    lists = write(tmp_path / "lists", "", 0, train=range(3), test=range(3, 5))
    path = lists / "art_train.txt"
    path.write_text(spoil(path.read_text()))
    assert re.search(said, message(folder, lists)), message(folder, lists)


def test_labels_must_count_without_a_gap(folder: Path, tmp_path: Path) -> None:
    lists = write(tmp_path / "lists", "", 2, train=range(3), test=range(3, 5))
    assert "labels: expected to count from 0 or 1 without a gap, got [2, 3]" in message(
        folder, lists
    )


def test_missing_lists_are_named(folder: Path, tmp_path: Path) -> None:
    lists = write(tmp_path / "lists", "", 0, train=range(3), test=range(3, 5))
    (lists / "photo_test.txt").unlink()
    assert "photo: no photo_test_kfold.txt and no photo_test.txt" in message(folder, lists)
    assert "there is no such folder" in message(folder, tmp_path / "none")


def test_a_class_left_without_test_pictures_is_named(folder: Path, tmp_path: Path) -> None:
    lists = write(tmp_path / "lists", "", 0, train=range(3), test=range(3, 5))
    path = lists / "art_test.txt"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if "dog" not in line)
    )
    with pytest.warns(UserWarning, match="stand in no list"):
        assert "art/dog: no image in the test part" in message(folder, lists)
