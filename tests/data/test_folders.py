"""Folders as they are unpacked, and every way in which one can be wrong."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from picture_files import encoded

from fastmask import data
from fastmask.data import folders, images
from fastmask.errors import DataError

Write = Callable[[dict[str, dict[str, int]]], Path]
GOOD = {"art": {"dog": 4, "cat": 3}, "photo": {"dog": 2, "cat": 5}}


def message(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        data.load(folder, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_folder_is_read_in_the_order_of_names(pictures: Write) -> None:
    folder = pictures(GOOD)
    domains = data.load(folder)
    assert domains.name == "set" and domains.domains == ("art", "photo")
    assert domains.classes == ("cat", "dog")
    assert domains.labels("art").tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert domains.labels("art").dtype == torch.int64
    assert domains.counts() == {"art": {"cat": 3, "dog": 4}, "photo": {"cat": 5, "dog": 2}}
    assert domains.item("art", 3) == "art/dog/p00.png"
    whole = images.read(folder / "art" / "dog" / "p00.png")
    assert torch.equal(domains.image("art", 3), whole)
    assert repr(domains) == "DomainSet(set: 2 classes; art 7, photo 7)"


def test_examples_are_small_pictures_of_each_class(pictures: Write) -> None:
    folder = pictures(GOOD)
    (folder / "art" / "cat" / "p00.png").write_bytes(encoded(99, side=200))
    found = data.load(folder).examples("art", per_class=2, side=50)
    assert list(found) == ["cat", "dog"]
    assert [a.shape for a in found["cat"]] == [(50, 50, 3), (12, 12, 3)]
    assert all(a.dtype == "uint8" for arrays in found.values() for a in arrays)


def test_the_fingerprint_follows_bytes_and_names(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    first = data.load(folder)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert data.load(moved).fingerprint == first.fingerprint
    (moved / "photo" / "dog" / "p01.png").write_bytes(encoded(1000))
    second = data.load(moved)
    assert second.fingerprint != first.fingerprint
    assert second.content("art") == first.content("art")
    assert second.content("photo") != first.content("photo")


def test_litter_and_lists_beside_the_domains_are_passed_over(pictures: Write) -> None:
    folder = pictures(GOOD)
    plain = data.load(folder)
    (folder / "readme.txt").write_text("lists")
    (folder / "splits").mkdir()
    (folder / "splits" / "art_train.txt").write_text("x 0")
    (folder / "__MACOSX" / "art" / "dog").mkdir(parents=True)
    (folder / "art" / "dog" / ".DS_Store").write_bytes(b"x")
    (folder / "art" / "dog" / "Thumbs.db").write_bytes(b"x")
    (folder / "art" / "list.csv").write_text("x")
    assert data.load(folder).fingerprint == plain.fingerprint


def test_copies_of_one_file_stay_on_one_side(pictures: Write) -> None:
    folder = pictures({"art": {"dog": 20, "cat": 20}, "photo": {"dog": 20, "cat": 20}})
    pairs = [
        ("art/dog/p00", "art/dog/p07"),
        ("art/cat/p01", "photo/cat/p05"),
        ("art/dog/p03", "photo/cat/p09"),
    ]
    for first, second in pairs:
        shutil.copy(folder / f"{first}.png", folder / f"{second}.png")
    domains = data.load(folder)
    for seed in range(20):
        tested = {
            domains.item(d, row).removesuffix(".png")
            for d in domains.domains
            for row in domains.split(d, seed).test.tolist()
        }
        assert all((first in tested) == (second in tested) for first, second in pairs)


def test_one_domain_is_refused(pictures: Write) -> None:
    assert "one domain alone (art)" in message(pictures({"art": {"dog": 3, "cat": 3}}))


def test_classes_that_differ_are_named_domain_by_domain(pictures: Write) -> None:
    said = message(pictures({"art": {"dog": 3, "cat": 3, "Elk": 3}, "photo": {"dog": 3, "elk": 3}}))
    assert "art: 1 of 4 classes missing: elk" in said
    assert "photo: 2 of 4 classes missing: Elk, cat" in said
    assert "Elk and elk differ by upper and lower case alone" in said


def test_every_broken_file_and_empty_class_is_named_at_once(pictures: Write) -> None:
    folder = pictures(GOOD)
    (folder / "art" / "dog" / "p01.png").write_bytes(b"")
    (folder / "art" / "dog" / "notes.txt").write_text("a dog")
    (folder / "photo" / "cat" / "p02.png").write_bytes(b"<html>not found</html>")
    for file in (folder / "photo" / "dog").iterdir():
        file.unlink()
    said = message(folder)
    assert "4 faults" in said
    assert "art/dog/p01.png: empty file" in said
    assert "art/dog/notes.txt: not an image" in said
    assert "photo/cat/p02.png: not an image" in said
    assert "photo/dog: no images" in said


def test_twenty_faults_are_named_and_the_rest_counted(pictures: Write) -> None:
    folder = pictures({"art": {"dog": 25, "cat": 3}, "photo": {"dog": 3, "cat": 3}})
    for file in (folder / "art" / "dog").iterdir():
        file.write_bytes(b"")
    said = message(folder)
    assert said.count("empty file") == 20 and "25 faults" in said
    assert said.endswith("and 5 more; `fastmask data check` names all")


def test_classes_that_cannot_be_split_are_refused(pictures: Write) -> None:
    folder = pictures({"art": {"dog": 1, "cat": 2}, "photo": {"dog": 2, "cat": 2}})
    shutil.copy(folder / "art/cat/p00.png", folder / "art/cat/p01.png")
    said = message(folder)
    assert "art/dog: one image, which cannot be split" in said
    assert "art/cat: 2 copies of one image, which cannot be split" in said


def test_folders_of_another_shape_get_a_hint(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    assert "there is no such folder" in message(tmp_path / "nowhere")
    assert "pass the folder one level up" in message(folder / "art")
    assert "pass the folder two levels up" in message(folder / "art" / "dog")
    above = tmp_path / "above"
    shutil.copytree(folder, above / "one")
    shutil.copytree(folder, above / "two")
    assert "is it one folder further down?" in message(above)
    (tmp_path / "void").mkdir()
    assert "no images" in message(tmp_path / "void")


def test_arguments_are_checked(pictures: Write) -> None:
    folder = pictures(GOOD)
    with pytest.raises(ValueError, match=r"test_fraction: expected a number in \(0, 1\), got 1.5"):
        data.load(folder, test_fraction=1.5)
    with pytest.raises(TypeError, match="data: expected 'digits' or a folder, got int"):
        data.load(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the digits have none"):
        data.load("digits", splits=folder)


def test_progress_counts_the_files(pictures: Write) -> None:
    seen: list[tuple[str, int, int]] = []
    data.load(pictures(GOOD), progress=lambda *said: seen.append(said))
    assert seen == [("reading pictures", 14, 14)]


def test_an_interrupted_reading_leaves_the_rest_unread(tmp_path: Path) -> None:
    read: list[Path] = []

    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    def look(path: Path) -> None:
        time.sleep(1e-3)
        read.append(path)

    with pytest.raises(KeyboardInterrupt):
        folders.inspect([tmp_path] * 5000, look, interrupt)
    # 256 until progress is told of, and what was in the eight hands or came in since.
    assert 256 <= len(read) < 4000
