"""Image files of every kind, and what is said of broken ones."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmask.data import images
from fastmask.errors import DataError

RED, GREEN = (200, 10, 20), (10, 180, 30)


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def two_colours() -> Image.Image:
    """Four wide, two high: the left half red, the right half green."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(GREEN, (2, 0, 4, 2))
    return image


def test_rgb_comes_back_exactly() -> None:
    decoded = images.decode(file(two_colours()))
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 2, 4)
    assert tuple(decoded[:, 0, 0].tolist()) == RED and tuple(decoded[:, 1, 3].tolist()) == GREEN


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([*RED, *GREEN])
        image.putpixel((1, 0), 1)
        decoded = images.decode(file(image, transparency=1))
        assert tuple(decoded[:, 0, 0].tolist()) == RED
    else:
        solid = (*RED, 255) if mode == "RGBA" else (90, 255)
        image = Image.new(mode, (2, 1), solid)
        image.putpixel((1, 0), (0,) * (len(mode) - 1) + (0,))
        decoded = images.decode(file(image))
        assert tuple(decoded[:, 0, 0].tolist()) == solid[:-1] * (3 if mode == "LA" else 1)
    assert decoded[:, 0, 1].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = images.decode(file(Image.fromarray(values)))
    assert decoded.tolist() == [[[0, 0, 1, 0x80, 0xFF]]] * 3


def test_cmyk_one_bit_and_palettes_are_converted() -> None:
    black = images.decode(file(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert black.shape == (3, 8, 8) and int(black.max()) <= 3
    bits = images.decode(file(Image.fromarray(np.array([[True, False]]))))
    assert bits.tolist() == [[[255, 0]]] * 3
    palette = images.decode(file(two_colours().convert("P", palette=Image.Palette.ADAPTIVE)))
    assert torch.equal(palette, images.decode(file(two_colours())))


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    decoded = images.decode(file(two_colours(), exif=exif))
    upright = images.decode(file(two_colours().transpose(Image.Transpose.ROTATE_270)))
    assert decoded.shape == (3, 4, 2) and torch.equal(decoded, upright)


def test_an_animation_gives_its_first_frame_and_the_ending_does_not_matter(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in (RED, GREEN)]
    content = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    path = tmp_path / "animation.jpg"
    path.write_bytes(content)
    assert tuple(images.read(path)[:, 1, 1].tolist()) == RED


def huge_png() -> bytes:
    """A few bytes that declare 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "empty file"),
        (b"no image at all", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer"),
        (huge_png(), "too many pixels"),
    ],
)
def test_files_that_do_not_open(content: bytes, said: str) -> None:
    assert said in str(images.fault(content))
    with pytest.raises(DataError, match=said):
        images.decode(content)


def test_a_picture_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 7)
    assert images.fault(file(two_colours())) == "declares 4x2 pixels, more than 7"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_open_but_do_not_decode(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = file(Image.fromarray(noise), kind)
    assert images.fault(whole) is None and images.decode(whole).shape == (3, 64, 64)
    with pytest.raises(DataError, match="cannot be decoded"):
        images.decode(whole[: len(whole) // 2])


def test_pixels_without_an_agreed_range_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point pixels"):
        images.decode(file(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(DataError, match="beyond 16 bits"):
        images.decode(file(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), "TIFF"))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        images.read(tmp_path / "gone.png")


KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 255), st.sampled_from(["set", "cut", "add"])),
    max_size=6,
)


@given(st.sampled_from(KINDS), st.booleans(), CHANGES, st.none() | st.floats(0, 1))
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_of_any_kind_is_a_picture_error_or_a_picture(
    kind: str, early: bool, changes: list[tuple[int, int, str]], cut: float | None
) -> None:
    """Decoders raise what they like: nothing of it may reach a user, and `traits` must not add to it."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    first, second = (Image.fromarray(pixels) for pixels in noise)
    several = (
        {"save_all": True, "append_images": [second]} if kind in ("GIF", "TIFF", "WEBP") else {}
    )
    content = bytearray(file(first, kind, **several))
    for place, value, how in changes:
        # Half of the examples damage headers, where the decisions are.
        at = place % max(min(len(content), 64 if early else len(content)), 1)
        content[at : at + (how != "add")] = b"" if how == "cut" else bytes([value])
    damaged = bytes(content[: None if cut is None else round(cut * len(content))])
    said = images.fault(damaged)
    try:
        decoded = images.decode(damaged)
    except images.PictureError:
        return
    assert said is None and decoded.dtype == torch.uint8 and decoded.shape[0] == 3
    images.traits(damaged)
