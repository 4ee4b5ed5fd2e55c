"""Stages 1 and 3: the head, starts, frozen entries, and what none and scratch are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from fastmask.bits import BitMask
from fastmask.data import Features
from fastmask.errors import FrozenEntriesMoved, TrainingDiverged
from fastmask.optim import verify
from fastmask.transfer import Config
from fastmask.transfer import source as stage_1
from fastmask.transfer import target as stage_3
from fastmask.transfer.batches import generator, orders, schedule
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED, Head, accuracy
from fastmask.transfer.plan import Run
from fastmask.transfer.source import Source

Settings = Callable[..., Config]


def part_of(features: dict[str, Features], name: str) -> Part:
    given = features[name]
    return Part(given.x[given.train], given.y[given.train])


def trained(config: Config, features: dict[str, Features]) -> Source:
    return stage_1.train(config, "ink", part_of(features, "ink"), 3, 0)


def run(strategy: str, start: str = "source-start") -> Run:
    return Run("ink", "oil", strategy, start, 0)


def half(source: Source) -> BitMask:
    draws = torch.Generator().manual_seed(5)
    return BitMask.from_bool(torch.rand(source.trained[MASKED].shape, generator=draws) < 0.5)


def as_integers(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def test_source_learns_and_keeps_its_first_values(
    settings: Settings, features: dict[str, Features]
) -> None:
    source = trained(settings(source_steps=200), features)
    part = part_of(features, "ink")
    assert accuracy(source.head, part.x, part.y) > 0.95
    bound = 1 / math.sqrt(12)
    for name, first in source.initial.items():
        assert float(first.abs().max()) <= bound
        assert not first.equal(source.trained[name])
        assert dict(source.head.named_parameters())[name].equal(source.trained[name])


@pytest.mark.parametrize("scaling", ["unit", "centred", "standard", "none"])
def test_scaling_does_what_it_says(scaling: str, settings: Settings) -> None:
    draws = torch.Generator().manual_seed(0)
    x = 3.0 + 100.0 * torch.rand(40, 7, generator=draws)
    x[:, 6] = 2.0
    head = Head(7, 3, 0, scaling, draws)
    head.fit(x)
    got = head.inputs(x)
    mean, std = x.mean(0), x.std(0, unbiased=False)
    wanted = {
        "unit": x / x.norm(dim=1, keepdim=True),
        "centred": (x - mean) / (x - mean).norm(dim=1, keepdim=True),
        "standard": (x - mean) / std.clamp_min(1e-3 * float(std.mean())) / math.sqrt(7),
        "none": x,
    }[scaling]
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    # The scale of a backbone's features changes nothing, where the head scales at all.
    if scaling != "none":
        again = Head(7, 3, 0, scaling, draws)
        again.fit(8.0 * x)
        assert torch.allclose(again.inputs(8.0 * x), got, rtol=1e-5, atol=1e-6)
    assert Head(7, 3, 0, "unit", draws).inputs(torch.zeros(1, 7)).equal(torch.zeros(1, 7))


def test_starts(settings: Settings, features: dict[str, Features]) -> None:
    source = trained(settings(), features)
    mask = half(source)
    frozen = mask.to_bool()
    first, last = source.initial[MASKED], source.trained[MASKED]

    def start(strategy: str, name: str, of: BitMask | None) -> torch.Tensor:
        return stage_3.start_values(source, run(strategy, name), of)[MASKED]

    assert start("none", "source-end", None).equal(last)
    assert start("scratch", "source-start", None).equal(first)
    assert start("naive", "source-end", mask).equal(last)
    assert start("naive", "source-start", mask).equal(torch.where(frozen, last, first))
    fresh = start("naive", "random", mask)
    assert fresh[frozen].equal(last[frozen])
    assert not torch.isin(fresh[~frozen], torch.cat([first[~frozen], last[~frozen]])).any()
    assert float(fresh[~frozen].abs().max()) <= 1 / math.sqrt(12)
    for strategy, name in (("none", "source-end"), ("naive", "random")):
        values = stage_3.start_values(
            source, run(strategy, name), None if name != "random" else mask
        )
        assert values["output.bias"].equal(source.trained["output.bias"])
    scratch = stage_3.start_values(source, run("scratch"), None)
    assert scratch["output.bias"].equal(source.initial["output.bias"])


@pytest.mark.parametrize("start", ["source-start", "source-end", "random"])
@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("train_unmasked", [False, True])
def test_frozen_entries_keep_their_bits_and_free_ones_move(
    start: str,
    hidden: int,
    train_unmasked: bool,
    settings: Settings,
    features: dict[str, Features],
) -> None:
    config = settings(
        hidden=hidden, train_unmasked=train_unmasked, target_weight_decay=0.01, target_lr=1.0
    )
    source = trained(config, features)
    mask = half(source)
    head, _ = stage_3.fine_tune(config, source, run("naive", start), part_of(features, "oil"), mask)
    now = dict(head.named_parameters())
    frozen = mask.to_bool()
    before = as_integers(source.trained[MASKED])
    after = as_integers(now[MASKED].detach())
    assert before[frozen].equal(after[frozen])
    # A free entry may come back to its bits by chance, not a third of them.
    assert (before[~frozen] != after[~frozen]).float().mean() > 0.6
    for name, param in now.items():
        if name != MASKED:
            assert param.equal(source.trained[name]) != train_unmasked, name


def test_none_is_plain_torch_fine_tuning(settings: Settings, features: dict[str, Features]) -> None:
    config = settings(target_steps=25, target_weight_decay=1e-3)
    source = trained(config, features)
    part = part_of(features, "oil")
    head, _ = stage_3.fine_tune(config, source, run("none", "source-end"), part, None)

    weight = source.trained[MASKED].clone().requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=60.0, momentum=0.9, weight_decay=1e-3, foreach=False)
    inputs = functional.normalize(part.x)
    for step, rows in enumerate(orders(len(part.y), 16, 25, generator(0, "target", "oil"))):
        optimizer.param_groups[0]["lr"] = 60.0 * (1 + math.cos(math.pi * step / 25)) / 2
        optimizer.zero_grad()
        logits = functional.linear(inputs[rows], weight, source.trained["output.bias"])
        functional.cross_entropy(logits, part.y[rows]).backward()
        optimizer.step()
    assert head.output.weight.equal(weight)


def test_a_mask_of_zeros_is_none_from_the_same_start(
    settings: Settings, features: dict[str, Features]
) -> None:
    config = settings()
    source = trained(config, features)
    part = part_of(features, "oil")
    nothing = BitMask.zeros(source.trained[MASKED].shape)
    masked, _ = stage_3.fine_tune(config, source, run("naive", "source-end"), part, nothing)
    plain, _ = stage_3.fine_tune(config, source, run("none", "source-end"), part, None)
    assert masked.output.weight.equal(plain.output.weight)


def test_a_mask_of_ones_changes_no_bit(settings: Settings, features: dict[str, Features]) -> None:
    config = settings(target_weight_decay=0.1)
    source = trained(config, features)
    everything = BitMask.ones(source.trained[MASKED].shape)
    head, _ = stage_3.fine_tune(config, source, run("naive"), part_of(features, "oil"), everything)
    assert as_integers(head.output.weight.detach()).equal(as_integers(source.trained[MASKED]))


def test_every_run_is_verified(
    settings: Settings, features: dict[str, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An optimizer that forgets its mask must not get past the check.
    class Forgetful(torch.optim.SGD):
        def __init__(self, *args: object, frozen: object, **options: object) -> None:
            super().__init__(*args, **options)

    config = settings()
    source = trained(config, features)
    monkeypatch.setattr(stage_3, "MaskedSGD", Forgetful)
    with pytest.raises(FrozenEntriesMoved, match=r"output\.weight"):
        stage_3.fine_tune(config, source, run("naive"), part_of(features, "oil"), half(source))
    assert stage_3.verify_frozen is verify.verify_frozen


def test_divergence_names_run_and_step(settings: Settings, features: dict[str, Features]) -> None:
    config = settings(target_lr=1e30, target_weight_decay=1.0)
    source = trained(config, features)
    with pytest.raises(
        TrainingDiverged, match=r"run ink -> oil, naive from source-start, seed 0: .* step \d+$"
    ):
        stage_3.fine_tune(config, source, run("naive"), part_of(features, "oil"), half(source))
    given = part_of(features, "ink")
    loud = Part(3e38 * given.x, given.y)
    with pytest.raises(TrainingDiverged, match=r"source ink, seed 0: .* at step \d+$"):
        stage_1.train(settings(scaling="none"), "ink", loud, 3, 0)


def test_batches_are_permutations_keyed_by_name() -> None:
    given = list(orders(10, 4, 5, generator(0, "a")))
    assert [len(rows) for rows in given] == [4] * 5
    for first, second in ((0, 1), (2, 3)):
        assert len(set(given[first].tolist()) | set(given[second].tolist())) == 8
    assert [r.tolist() for r in orders(10, 4, 5, generator(0, "a"))] == [r.tolist() for r in given]
    assert [r.tolist() for r in orders(10, 4, 5, generator(0, "b"))] != [r.tolist() for r in given]
    assert [r.tolist() for r in orders(10, 4, 5, generator(1, "a"))] != [r.tolist() for r in given]
    # Keys are not run together: ("a", "b") is not ("ab",).
    assert generator(0, "a", "b").initial_seed() != generator(0, "ab").initial_seed()
    assert sorted(next(iter(orders(3, 64, 1, generator(0, "a")))).tolist()) == [0, 1, 2]


def test_schedule() -> None:
    assert [schedule("constant", i, 4) for i in range(4)] == [1.0] * 4
    assert [schedule("cosine", i, 4) for i in range(4)] == pytest.approx(
        [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2], abs=1e-12
    )
