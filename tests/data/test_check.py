"""`data.check`: every fault named at once, and an error exactly where `load` or a decoder refuses."""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import encoded
from PIL import Image

from fastmask import data
from fastmask.data import Report
from fastmask.data.check import ERRORS, FEW, WARNINGS
from fastmask.errors import DataError

Write = Callable[[dict[str, dict[str, int]]], Path]
# Thirty of a hundred are tested on, so that no class has few test pictures.
GOOD = {"art": {"dog": 20, "cat": 20}, "photo": {"dog": 20, "cat": 20}}


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def plain(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(seed)))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(plain(907), "JPEG", exif=exif)


def put(name: str, content: bytes) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def copy(source: str, target: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / source, folder / target)


def link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target)


def recompressed(folder: Path) -> None:
    image = Image.open(folder / "art/dog/p02.png")
    (folder / "photo/dog/z_again.bmp").write_bytes(file(image, "BMP"))


# What is done to a good folder; the kind of finding, its place, and a part of what is said there.
SPOILT: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "zero bytes": (put("art/dog/z0.png", b""), "empty", "art/dog/z0.png", "empty file"),
    "text": (put("art/dog/z1.png", b"<html>"), "foreign", "art/dog/z1.png", "not an image"),
    "notes": (put("photo/cat/z.txt", b"a cat"), "foreign", "photo/cat/z.txt", "not an image"),
    "lfs": (
        put("art/dog/z2.png", b"version https://git-lfs.github.com/spec/v1\n"),
        "pointer", "art/dog/z2.png", "git-LFS",
    ),
    "truncated": (
        put("art/cat/z3.png", encoded(900, side=64)[:3000]), "damaged", "art/cat/z3.png", "truncated",
    ),
    "float": (
        put("art/cat/z4.tif", file(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")),
        "range", "art/cat/z4.tif", "floating-point",
    ),
    "link to nothing": (
        link("art/dog/z5.png", "gone.png"), "unreadable", "art/dog/z5.png", "No such file",
    ),
    "empty class": (
        lambda f: [(f / d / "Void").mkdir() for d in ("art", "photo")],
        "no-images", "art/Void", "no images",
    ),
    "class of one domain": (
        lambda f: shutil.copytree(f / "art/dog", f / "art/Dog"),
        "classes", "photo", "1 of 3 classes missing: Dog",
    ),
    "one picture": (
        lambda f: [p.unlink() for p in (f / "art/cat").iterdir()] and put("art/cat/z.png", encoded(1))(f),
        "unsplittable", "art/cat", "one image, which cannot be split",
    ),
    "cmyk": (
        put("art/dog/z6.jpg", file(plain(901).convert("CMYK"), "JPEG")), "cmyk", "art/dog/z6.jpg", "",
    ),
    "lab": (
        put("art/dog/z7.tif", file(Image.new("LAB", (4, 4), (90, 3, 200)), "TIFF")),
        "colours", "art/dog/z7.tif", "",
    ),
    "sixteen bits": (
        put("art/dog/z8.png", file(Image.fromarray(np.full((3, 3), 40_000, np.uint16)))),
        "sixteen", "art/dog/z8.png", "",
    ),
    "palette": (
        put("art/dog/z9.png", file(plain(902).convert("P"))), "palette", "art/dog/z9.png", "",
    ),
    "transparent": (
        put("art/dog/za.png", file(plain(903).convert("RGBA"))), "transparent", "art/dog/za.png", "",
    ),
    "animated": (
        put("art/dog/zb.gif", file(plain(904), "GIF", save_all=True, append_images=[plain(905)])),
        "frames", "art/dog/zb.gif", "",
    ),
    "rotated": (put("art/dog/zc.jpg", turned()), "rotated", "art/dog/zc.jpg", ""),
    "ending": (put("art/dog/zd.jpg", encoded(906)), "ending", "art/dog/zd.jpg", "is PNG"),
    "case": (put("art/dog/P00.png", encoded(908)), "case", "art/dog/p00.png", "as P00.png"),
    "accents": (
        lambda f: [put(f"art/dog/{n}.png", encoded(i))(f) for i, n in enumerate(("\u00e9", "e\u0301"), 920)],
        "case", "art/dog/\u00e9.png", "as e\u0301.png",
    ),
    "line break": (put("art/dog/z\n.png", encoded(909)), "name", "art/dog/z\n.png", ""),
    "link": (link("art/dog/zf.png", "../../art/dog/p03.png"), "links", "art/dog/zf.png", "p03.png"),
    "copy": (
        copy("art/dog/p01.png", "art/dog/p1_copy.png"), "copies", "art/dog/p1_copy.png", "as art/dog/p01.png",
    ),
    "copy in a domain": (
        copy("art/dog/p04.png", "photo/dog/zg.png"), "copies-domains", "photo/dog/zg.png", "as art/dog/p04",
    ),
    "copy in a class": (
        copy("art/dog/p05.png", "photo/cat/zh.png"), "copies-classes", "photo/cat/zh.png", "as art/dog/p05",
    ),
    "equal pixels": (
        recompressed, "copies-pixels", "photo/dog/z_again.bmp", "as art/dog/p02.png",
    ),
    "a file beside": (put("art/list.txt", b"x"), "passed-over", "art/list.txt", "beside the class"),
    "a folder below": (
        lambda f: (f / "art/dog/more").mkdir(), "passed-over", "art/dog/more", "no file",
    ),
    "a folder of files": (
        lambda f: (f / "lists").mkdir() or put("lists/a.txt", b"x")(f), "passed-over", "lists", "no domain",
    ),
}  # fmt: skip


def named(report: Report) -> dict[str, list[str]]:
    return {found.kind: [str(place) for place in found.places] for found in report.findings}


def loads(folder: Path, splits: Path | None = None) -> bool:
    """Whether the library itself takes the folder, draws its split and decodes every picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            domains = data.load(folder, splits=splits)
        for domain in domains.domains:
            domains.split(domain, 0)
            for row in range(len(domains.labels(domain))):
                domains.image(domain, row)
    except DataError:
        return False
    return True


def test_a_good_folder_has_no_findings(pictures: Write) -> None:
    folder = pictures(GOOD)
    report = data.check(folder)
    assert report == Report(str(folder), None, ("cat", "dog"), GOOD, ())
    assert report.errors == report.warnings == () and loads(folder)


@pytest.mark.parametrize("name", SPOILT)
def test_a_fault_is_named_and_is_an_error_where_the_library_refuses(
    pictures: Write, name: str
) -> None:
    spoil, kind, path, said = SPOILT[name]
    folder = pictures(GOOD)
    spoil(folder)
    report = data.check(folder)
    (found,) = [f for f in report.findings if f.kind == kind]
    (place,) = [p for p in found.places if p.path == path]
    assert said in place.detail and bool(said) == bool(place.detail)
    assert found.level == ("error" if kind in ERRORS else "warning")
    assert bool(report.errors) != loads(folder)


@given(st.sets(st.sampled_from(sorted(SPOILT)), max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_faults_are_named_together_and_agree_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("set") / "set"
    for number, (domain, label) in enumerate((d, c) for d in GOOD for c in GOOD[d]):
        (folder / domain / label).mkdir(parents=True)
        for i in range(20):
            (folder / domain / label / f"p{i:02}.png").write_bytes(encoded(100 * number + i))
    # Removing a class's pictures goes first, so that nothing else is removed with them.
    for name in sorted(names, key=lambda name: (name != "one picture", name)):
        SPOILT[name][0](folder)
    report = data.check(folder)
    places = {(f.kind, p.path) for f in report.findings for p in f.places}
    # A second copy of a class makes copies of the copies: which is named first is not of interest.
    expected = {SPOILT[name][1:3] for name in names if not SPOILT[name][1].startswith("copies")}
    assert expected <= places
    assert bool(report.errors) != loads(folder)
    assert report == data.check(folder)


def test_counts_are_of_pictures_that_can_be_used(pictures: Write) -> None:
    folder = pictures({"art": {"dog": 6, "cat": 6}, "photo": {"dog": 6}})
    put("art/dog/p00.png", b"")(folder)
    report = data.check(folder)
    assert report.counts == {"art": {"cat": 6, "dog": 5}, "photo": {"dog": 6}}
    assert report.classes == ("cat", "dog")


def test_few_test_pictures_are_a_warning(pictures: Write) -> None:
    report = data.check(pictures({"art": {"dog": 4, "cat": 40}, "photo": {"dog": 40, "cat": 15}}))
    # round(0.3 * 4) and round(0.3 * 15); the others have twelve.
    assert named(report) == {
        "few": ["art/dog: 1 in the test part", "photo/cat: 4 in the test part"]
    }
    assert FEW == 5


def test_remarks_of_the_decoder_stay_off_the_terminal(pictures: Write) -> None:
    folder = pictures(GOOD)
    whole = file(plain(960), "TIFF", description="a dog")
    # The count in the entry of tag 270: Pillow passes over a tag larger than the file and warns.
    place = whole.index((270).to_bytes(2, "little") + (2).to_bytes(2, "little")) + 4
    put("art/dog/z.tif", whole[:place] + b"\0\0\0\1" + whole[place + 4 :])(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = data.check(folder)
        assert not said and not report.errors
        data.load(folder)
        assert said, "the picture has something to remark on"


def test_a_bomb_is_named_unopened(pictures: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(GOOD)
    put("art/dog/z.png", encoded(1, side=13))(folder)
    monkeypatch.setattr("fastmask.data.images.MAX_PIXELS", 12 * 12)
    assert named(data.check(folder))["large"] == [
        "art/dog/z.png: declares 13x13 pixels, more than 144"
    ]
    assert not loads(folder)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files and folders that cannot be opened; permissions themselves do not bind root."""
    names: set[str] = set()
    plain_open, plain_iterdir = open, Path.iterdir

    def opened(path: object, *rest: object, **options: object) -> object:
        if isinstance(path, Path) and path.name in names:
            raise PermissionError(13, "Permission denied")
        return plain_open(path, *rest, **options)  # type: ignore[call-overload]

    def listed(path: Path) -> Iterator[Path]:
        if path.name in names:
            raise PermissionError(13, "Permission denied")
        return plain_iterdir(path)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(Path, "iterdir", listed)
    return names


def test_what_may_not_be_read_is_named_and_not_taken_for_empty(
    pictures: Write, forbidden: set[str]
) -> None:
    folder = pictures({**GOOD, "sketch": {"dog": 3, "cat": 3, "elk": 3}})
    (folder / "clay").mkdir()
    forbidden |= {"elk", "clay", "p01.png"}
    found = named(data.check(folder))
    assert found["unlisted"] == [
        "clay: cannot be listed (Permission denied)",
        "sketch/elk: cannot be listed (Permission denied)",
    ]
    assert "passed-over" not in found
    assert len(found["unreadable"]) == 6
    assert found["unreadable"][0] == "art/cat/p01.png: cannot be read (Permission denied)"
    assert "no-images" not in found
    with pytest.raises(DataError, match=r"sketch/elk: cannot be listed \(Permission denied\)"):
        data.load(folder)


@pytest.mark.parametrize("which, said", [("art", "one level up"), ("art/dog", "two levels up")])
def test_folders_of_another_shape_get_the_hint_that_load_gives(
    pictures: Write, which: str, said: str
) -> None:
    folder = pictures(GOOD) / which
    ((found),) = data.check(folder).findings[:1]
    assert found.kind == "shape" and said in found.places[0].detail and not loads(folder)


def test_one_domain_and_one_class_are_errors(pictures: Write, tmp_path: Path) -> None:
    folder = pictures({"art": {"dog": 20}, "photo": {"dog": 20}})
    assert "one class alone (dog)" in named(data.check(folder))["shape"][0]
    assert not loads(folder)
    shutil.rmtree(folder / "photo")
    assert "one domain alone (art)" in named(data.check(folder))["shape"][0]


def test_arguments_are_checked(pictures: Write, tmp_path: Path) -> None:
    folder = pictures(GOOD)
    with pytest.raises(DataError, match="there is no such folder; expected DIR/domain/class/image"):
        data.check(tmp_path / "nowhere")
    with pytest.raises(DataError, match="the digits are drawn by fastmask"):
        data.check("digits")
    with pytest.raises(DataError, match="splits: there is no such folder: .*nowhere"):
        data.check(folder, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="folder: expected a folder, got int"):
        data.check(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"test_fraction: expected a number in \(0, 1\), got 1"):
        data.check(folder, test_fraction=1)


def test_nothing_is_written(pictures: Write) -> None:
    folder = pictures(GOOD)

    def state() -> list[tuple[str, int, int]]:
        found = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")]
        return sorted(found)

    before = state()
    data.check(folder)
    assert state() == before


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_names_that_are_not_utf8_are_named(pictures: Write) -> None:
    folder = pictures(GOOD)
    place = os.fsencode(folder / "art" / "dog") + b"/\xff.png"
    try:
        with open(place, "wb") as handle:
            handle.write(encoded(950))
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert named(data.check(folder)) == {"name": ["art/dog/\udcff.png"]}


def test_every_kind_is_proved_and_has_words() -> None:
    for words in (*ERRORS.values(), *WARNINGS.values()):
        assert all(words)
    # Those that need lists, a limit, permissions or a shape of their own have tests of their own.
    elsewhere = {"unlisted", "shape", "large", "few"}
    of_lists = {"lists", "sides", "in-no-list", "copies-listed", "copies-sides"}
    shown = {kind for _, kind, _, _ in SPOILT.values()}
    assert shown | elsewhere | of_lists == {*ERRORS, *WARNINGS}
