"""Measured tile shapes: when they are measured, that it is once, and where the outcome is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask import _store
from fastmask._triton import tune

pytest.importorskip("triton", reason="the package triton is not installed")
SHAPES: list[tuple[int, ...]] = [(16, 1), (16, 2), (16, 3), (16, 4)]
TIMES = {(16, 1): 2.0, (16, 2): 3.0, (16, 3): 1.0, (16, 4): float("inf")}
LIKE = torch.zeros(1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, ...]]:
    """The shapes that are measured on a device that is not there."""
    taken: list[tuple[int, ...]] = []

    def seconds(run: Callable[[Any], object], shape: tuple[int, ...]) -> float:
        run(shape)
        return TIMES[shape]

    monkeypatch.setenv("FASTMASK_AUTOTUNE", "1")
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "asked", lambda _: True)
    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return taken


def choose(taken: list[tuple[int, ...]], *key: int) -> tuple[int, ...]:
    return tune.best("kernel", key, SHAPES, taken.append, LIKE)


def test_the_fastest_is_kept_for_each_key(
    measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert choose(measured, 64, 128) == (16, 3) and measured == SHAPES
    assert choose(measured, 64, 128) == (16, 3) and measured == SHAPES, "once a process"
    monkeypatch.setattr(tune, "_chosen", {})
    assert choose(measured, 64, 128) == (16, 3) and measured == SHAPES, "once a device"
    assert len(list(tmp_path.iterdir())) == 1
    choose(measured, 64, 256)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    choose(measured, 64, 128)
    assert measured == SHAPES * 3


def test_damage_and_folders_that_cannot_be_written(
    measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choose(measured, 1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    monkeypatch.setattr(tune, "_chosen", {})
    with pytest.warns(_store.CacheWarning, match="damaged"):
        assert choose(measured, 1) == (16, 3)
    monkeypatch.setenv("FASTMASK_CACHE", str(file))
    with pytest.warns(_store.CacheWarning, match="cannot be written to"):
        assert choose(measured, 2) == (16, 3)
    assert measured == SHAPES * 3


def test_nothing_is_measured_within_a_graph(
    measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(measured, 64, 128) == (16, 1) and not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(measured, 64, 128) == (16, 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(measured, 64, 128) == (16, 3), "what is known is used"


@pytest.mark.parametrize("switch", [None, "0", "1"])
def test_off_unless_asked_for_and_off_a_gpu(
    switch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTMASK_AUTOTUNE", raising=False)
    if switch is not None:
        monkeypatch.setenv("FASTMASK_AUTOTUNE", switch)
    assert tune.best("kernel", (1,), SHAPES, lambda _: pytest.fail("measured"), LIKE) == (16, 1)


def test_shapes_that_do_not_fit_are_passed_by() -> None:
    from triton.runtime.errors import OutOfResources

    def bench(run: Callable[[], object], **_: Any) -> float:
        run()
        return 2.5

    def run(shape: tuple[int, ...]) -> None:
        if shape == (16, 4):
            raise OutOfResources(1, 0, "shared memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.testing.do_bench", bench)
        assert tune.seconds(run, (16, 1)) == 0.0025
        assert tune.seconds(run, (16, 4)) == float("inf")


def test_rows_that_share_a_choice() -> None:
    assert [tune.bucket(rows) for rows in (0, 1, 2, 3, 5, 8, 9, 1000)] == [
        1,
        1,
        2,
        4,
        8,
        8,
        16,
        1024,
    ]
