"""Grouped stages against the stages themselves: within 1e-9 in float64, within one test row in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask import BitMask
from fastmask.data import Features
from fastmask.errors import TrainingDiverged
from fastmask.transfer import Config, grouped, run
from fastmask.transfer import source as stage_1
from fastmask.transfer import target as stage_3
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.plan import plan
from fastmask.transfer.source import values
from fastmask.transfer.strategies import FIND

Settings = Callable[..., Config]
# Both do the same in exact arithmetic. A float64 sum over K = 12 features or B = 16 rows errs by less than
# 1e-14 of its terms, a few hundred steps add such errors up and momentum 0.9 ten times over; logits, whose
# threshold is a step, stay apart unless an error crosses one of 2^24 places.
_EXACT = 1e-9


def part(features: Features, dtype: torch.dtype = torch.float64) -> Part:
    return Part(features.x[features.train].to(dtype), features.y[features.train])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# Where a row lights up one hidden unit alone its gradient is exactly 0, of which Adam makes steps out of the
# rounding: 32 units are enough for these rows.
HEADS = [
    {},
    {"scaling": "centred"},
    {"scaling": "standard"},
    {"scaling": "none", "target_lr": 0.5},
    {"hidden": 32},
    {"hidden": 32, "scaling": "standard"},
]


@pytest.mark.parametrize("given", HEADS, ids=str)
def test_sources_are_those_of_the_loop(
    given: dict[str, Any], settings: Settings, features: dict[str, Features]
) -> None:
    # Of 30 rows: a batch of 64 takes them all, and is another size than 16 of 30 is.
    for batch in (16, 64):
        config = settings(batch=batch, **given)
        problems = [(name, part(features[name]), seed) for name in features for seed in (0, 5)]
        for made, (domain, rows, seed) in zip(
            grouped.source.train(config, problems, 3), problems, strict=True
        ):
            one = stage_1.train(config, domain, rows, 3, seed)
            assert (made.domain, made.seed) == (domain, seed)
            assert math.isclose(made.loss, one.loss, abs_tol=_EXACT)
            for name, value in one.trained.items():
                assert apart(made.trained[name], value) < _EXACT
                assert torch.equal(made.initial[name], one.initial[name])
                assert torch.equal(values(made.head)[name], made.trained[name])


def test_sources_with_other_numbers_of_rows_are_trained_too(
    settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(batch=24)
    few = Part(part(features["ink"]).x[:12], part(features["ink"]).y[:12])
    problems = [("ink", few, 0), ("oil", part(features["oil"]), 0), ("ink", few, 1)]
    for made, (domain, rows, seed) in zip(
        grouped.source.train(config, problems, 3), problems, strict=True
    ):
        one = stage_1.train(config, domain, rows, 3, seed)
        assert apart(made.trained[MASKED], one.trained[MASKED]) < _EXACT


SETTINGS = ("", "beta=0.1", "tau=0.5", "density=0.25", "samples=2", "mask_steps=9", "mask_lr=0.05")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"reg": "sigmoid", "beta": 3.0},
        {"beta_unit": "absolute", "beta": 1e-3, "mask_clip": None},
        {"mask_clip": 1e-3, "logit_clamp": 2.05},
        {"hidden": 32},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::fastmask.transfer.MaskWarning")
def test_binary_masks_are_those_of_the_loop(
    given: dict[str, Any], settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(**given)
    problems = []
    for name, seed in (("ink", 0), ("oil", 0), ("ink", 3)):
        rows = part(features[name])
        source = stage_1.train(config, name, rows, 3, seed)
        problems += [
            grouped.binary.Problem(strategy, config.at(setting), source, rows)
            for strategy in ("binary", "kl")
            for setting in SETTINGS
        ]
    for made, problem in zip(grouped.binary.find(problems), problems, strict=True):
        one = FIND[problem.strategy](problem.config, problem.source, problem.part)
        assert one.scores is not None and made.scores is not None
        assert apart(made.scores, one.scores) < _EXACT
        assert torch.equal(made.frozen.bits, one.frozen.bits)
        assert made.notes.keys() == one.notes.keys()
        for name, value in one.notes.items():
            assert math.isclose(made.notes[name], value, rel_tol=_EXACT, abs_tol=_EXACT), name


EDITS = ("", "editor_share=0.3", "editor_beta=-30", "editor_tolerance=1e-5", "editor_steps=35")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"editor_preserve": "kl", "editor_cap": 0.05, "editor_lr": 0.3},
        {"editor_beta_unit": "absolute", "editor_beta": -1e-3},
        {"hidden": 32},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::fastmask.transfer.MaskWarning")
def test_editor_masks_are_those_of_the_loop(
    given: dict[str, Any], settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(**{"editor_steps": 60, "editor_lr": 0.1, **given})
    problems = []
    for name, seed in (("ink", 0), ("oil", 0), ("ink", 3)):
        rows = part(features[name])
        source = stage_1.train(config, name, rows, 3, seed)
        problems += [
            grouped.binary.Problem("editor", config.at(setting), source, rows) for setting in EDITS
        ]
    taken = set()
    for made, problem in zip(grouped.editor.find(problems), problems, strict=True):
        one = FIND["editor"](problem.config, problem.source, problem.part)
        assert one.scores is not None and made.scores is not None
        assert apart(made.scores, one.scores) < _EXACT
        assert torch.equal(made.frozen.bits, one.frozen.bits)
        assert made.notes.keys() == one.notes.keys()
        for name, value in one.notes.items():
            assert math.isclose(made.notes[name], value, rel_tol=_EXACT, abs_tol=_EXACT), name
        taken.add(made.notes["steps"])
    assert taken - {35, 60}, "some were to stop early"


@pytest.mark.parametrize(
    "given",
    [
        *HEADS,
        {"target_weight_decay": 0.01},
        {"target_momentum": 0.0, "target_schedule": "constant"},
        {"train_unmasked": True, "target_weight_decay": 0.01, "target_lr": 3.0},
        {"batch": 64},
    ],
    ids=str,
)
def test_fine_tuned_heads_are_those_of_the_loop(
    given: dict[str, Any], settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(target_steps=40, **given)
    rows = {name: part(features[name]) for name in features}
    sources = {name: stage_1.train(config, name, rows[name], 3, 0) for name in rows}
    draws = torch.Generator().manual_seed(0)
    group = plan(config, tuple(features))[0]
    tasks: list[grouped.target.Task] = [
        (
            task,
            sources[task.source],
            BitMask.from_bool(
                torch.rand(sources[task.source].trained[MASKED].shape, generator=draws) < 0.5
            )
            if task.strategy in config.strategies
            else None,
        )
        for task in group.runs
    ]
    made = grouped.target.fine_tune(config, tasks, rows[group.target])
    for (head, loss), (task, source, frozen) in zip(made, tasks, strict=True):
        one, one_loss = stage_3.fine_tune(config, source, task, rows[group.target], frozen)
        assert math.isclose(loss, one_loss, abs_tol=_EXACT), str(task)
        for name, value in values(one).items():
            assert apart(values(head)[name], value) < _EXACT, f"{task}: {name}"
        assert not any(param.requires_grad for param in head.parameters())


@pytest.mark.parametrize("given", [{}, {"hidden": 32, "train_unmasked": True}], ids=str)
def test_a_sweep_agrees_with_the_loop_within_one_test_row(
    given: dict[str, Any], settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    if given.get("train_unmasked"):
        given = {**given, "target_lr": 3.0}
    config = settings(
        source_steps=100, mask_steps=40, editor_steps=40, target_steps=30,
        vary=("density=0.3", "naive_k=0.5"), **given,
    )  # fmt: skip
    fast = run(config, features=features)
    loop = run(
        settings(**{**vars(config), "engine": "loop", "out": tmp_path / "loop"}), features=features
    )
    assert [row.key for row in fast.rows] == [row.key for row in loop.rows]
    for a, b in zip(fast.rows, loop.rows, strict=True):
        assert a.frozen_density == b.frozen_density
        for name in ("source_accuracy", "target_accuracy", "source_accuracy_before"):
            assert abs(getattr(a, name) - getattr(b, name)) * 15 < 1.5, f"{a.key}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_entries_keep_their_bits_whatever_is_about(
    dtype: torch.dtype, settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(starts=("source-end",), target_steps=5)
    rows = part(features["oil"], dtype)
    source = stage_1.train(config, "ink", part(features["ink"], dtype), 3, 0)
    # Zeros of both signs, and the smallest number there is: w - lr * 0 must give them back.
    source.trained[MASKED].view(-1)[:3] = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).smallest_normal / 2], dtype=dtype
    )
    frozen = BitMask.from_bool(torch.arange(36).view(3, 12) % 2 < 2)
    runs = next(r for r in plan(config, ("ink", "oil")) if r.target == "oil").runs
    task = next(r for r in runs if r.strategy == "binary")
    ((head, _), (free, _)) = grouped.target.fine_tune(
        config, [(task, source, frozen), (runs[0], source, None)], rows
    )
    kind = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(head.output.weight.view(kind), source.trained[MASKED].view(kind))
    assert not torch.equal(free.output.weight, source.trained[MASKED])


def test_divergence_names_the_run_and_the_step(
    settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(target_lr=1e30, target_weight_decay=1.0, strategies=())
    source = stage_1.train(config, "ink", part(features["ink"], torch.float32), 3, 0)
    group = next(g for g in plan(config, ("ink", "oil")) if g.target == "oil")
    with pytest.raises(
        TrainingDiverged, match=r"^run ink -> oil, none from source-end, seed 0: .* at step \d+$"
    ):
        grouped.target.fine_tune(
            config, [(group.runs[0], source, None)], part(features["oil"], torch.float32)
        )


def test_a_source_that_diverges_is_named(settings: Settings, features: dict[str, Features]) -> None:
    config = settings()
    spoiled = part(features["oil"])
    spoiled.x[3] = math.inf
    problems = [("ink", part(features["ink"]), 0), ("oil", spoiled, 7)]
    with pytest.raises(TrainingDiverged, match="^source oil, seed 7: the loss is nan at step"):
        grouped.source.train(config, problems, 3)
