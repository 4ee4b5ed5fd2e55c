"""Stage 2: which entries each strategy freezes, and what it does with bad settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch

from fastmask import ops
from fastmask.data import Features
from fastmask.errors import TrainingDiverged
from fastmask.transfer import Config, MaskWarning
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source, train
from fastmask.transfer.strategies import binary, editor, naive

Settings = Callable[..., Config]
N = 1_000_000


@pytest.fixture
def part(features: dict[str, Features]) -> Part:
    given = features["ink"]
    return Part(given.x[given.train], given.y[given.train])


def stage_1(config: Config, part: Part) -> Source:
    return train(config, "ink", part, 3, 0)


def phi(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def four_sigma(share: float) -> float:
    """Four standard deviations of a share counted over N draws; the rules' own mean and std add as much."""
    return 4 * math.sqrt(share * (1 - share) / N) * 2


def test_naive_freezes_what_stands_out_of_normal_weights() -> None:
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    share = 2 * phi(-1)
    assert abs(share - 0.3173) < 1e-4
    assert abs(naive.outliers(weight, 1.0).density - share) < four_sigma(share)


def test_naive_is_strict_and_takes_the_std_with_n_minus_1() -> None:
    # mean 0, std sqrt(8 / 3): 2 is beyond it, 0 is not.
    assert naive.outliers(torch.tensor([[2.0, -2.0], [0.0, 0.0]]), 1.0).to_bool().tolist() == [
        [True, True],
        [False, False],
    ]
    # mean 0, std 1.16 with n - 1; with n it would be 1.005, and 1.1 beyond it.
    assert naive.outliers(torch.tensor([[1.1, -1.1], [0.9, -0.9]]), 1.0).count() == 0
    assert naive.outliers(torch.full((3, 5), 0.7), 1.0).count() == 0


@pytest.mark.parametrize("k, expected", [(1.0, 0.155), (0.0, 0.575), (-1.0, 0.839)])
def test_editor_rule_on_normal_edits(k: float, expected: float, settings: Settings) -> None:
    size = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1)).abs()
    mean, std = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)
    share = 2 * phi(mean - k * std) - 1
    assert abs(share - expected) < 6e-4
    found = editor.least_edited(size, settings(editor_k=k), "a test")
    assert abs(found.density - share) < four_sigma(share)


def test_editor_rule_on_laplace_edits_freezes_nothing_and_says_so(settings: Settings) -> None:
    # |Laplace| is exponential: mean = std, so that mean - std is 0 but for the draw; 1.01 is safely below.
    size = torch.empty(1000, 1000).exponential_(generator=torch.Generator().manual_seed(2))
    with pytest.warns(MaskWarning, match="editor_rule='quantile'"):
        found = editor.least_edited(size, settings(editor_k=1.01), "a test")
    assert found.count() == 0
    quantile = editor.least_edited(
        size, settings(editor_rule="quantile", editor_share=0.3), "a test"
    )
    assert quantile.count() == 300_000
    assert size[quantile.to_bool()].max() <= size[~quantile.to_bool()].min()


def test_editor_moves_weights_that_nothing_uses(settings: Settings, part: Part) -> None:
    # A dead input has no cross-entropy gradient: from exactly 0 its edit would stay there and be frozen.
    part.x[:, 5] = 0.0
    config = settings(editor_steps=40, editor_tolerance=1e6)
    found = editor.find(config, stage_1(config, part), part)
    assert found.scores is not None
    assert not found.frozen.to_bool()[:, 5].any()
    assert found.scores[:, 5].abs().min() > 0.5 * found.scores.abs().max()


def test_editor_holds_its_cap_and_stops_at_its_tolerance(settings: Settings, part: Part) -> None:
    strong = {"editor_steps": 400, "editor_beta": -30.0, "editor_lr": 0.2}
    config = settings(**strong, editor_tolerance=1e6, editor_cap=2.0)
    source = stage_1(config, part)
    cap = 2.0 * float(source.trained[MASKED].std())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        free = editor.find(config, source, part)
        held = editor.find(settings(**strong, editor_tolerance=0.05), source, part)
    assert free.scores is not None and float(free.scores.abs().max()) <= cap * (1 + 1e-6)
    assert free.notes["share_at_cap"] > 0.5
    assert free.notes["loss"] > free.notes["loss_before"] + 0.05
    assert held.notes["steps"] < 400
    assert held.notes["loss"] <= held.notes["loss_before"] + 0.05


def test_editor_can_preserve_outputs_in_place_of_labels(settings: Settings, part: Part) -> None:
    config = settings(editor_preserve="kl", editor_tolerance=0.02, editor_rule="quantile")
    found = editor.find(config, stage_1(config, part), part)
    assert abs(found.notes["loss_before"]) < 1e-6 and -1e-6 < found.notes["loss"] <= 0.02


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_binary_freezes_the_share_asked_for(density: float, settings: Settings, part: Part) -> None:
    config = settings(density=density)
    found = binary.find(config, stage_1(config, part), part)
    assert found.frozen.count() == math.floor(density * 36 + 0.5)
    assert found.scores is not None
    kept = found.frozen.to_bool()
    assert kept.all() or found.scores[kept].min() >= found.scores[~kept].max()


@pytest.mark.parametrize("reg", ["logit", "sigmoid"])
@pytest.mark.parametrize("unit", ["gradient", "absolute"])
def test_binary_without_a_density_is_ruled_by_beta(
    reg: str, unit: str, settings: Settings, part: Part
) -> None:
    def density(beta: float) -> float:
        config = settings(
            density=None, beta=beta, reg=reg, beta_unit=unit, mask_steps=100, mask_lr=0.05
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaskWarning)
            found = binary.find(config, source, part)
        assert found.scores is not None
        assert found.frozen.bits.equal(ops.pack(found.scores, 0.0))
        return found.frozen.density

    source = stage_1(settings(source_steps=200), part)
    none, much = density(0.0), density(100.0)
    assert none > 0.8 and much < 0.2


def test_binary_keeps_a_weight_that_decides_and_frees_one_that_nothing_uses(
    settings: Settings,
) -> None:
    draws = torch.Generator().manual_seed(3)
    x = torch.zeros(64, 6)
    y = torch.arange(64) % 2
    x[:, 0] = y * 2.0 - 1.0
    x[:, 1:3] = 0.01 * torch.randn(64, 2, generator=draws)
    config = settings(density=None, mask_steps=400, source_steps=200, scaling="none")
    found = binary.find(config, train(config, "s", Part(x, y), 2, 0), Part(x, y))
    kept = found.frozen.to_bool()
    assert kept[:, 0].all() and not kept[:, 3:].any()


def test_logits_that_run_off_are_held_and_reported(settings: Settings, part: Part) -> None:
    config = settings(beta=1e6, mask_lr=0.5, mask_steps=60, logit_clamp=4.0)
    source = stage_1(config, part)
    with pytest.warns(MaskWarning, match=r"100 % of the logits are at \+-4"):
        found = binary.find(config, source, part)
    assert found.notes["share_at_clamp"] == 1.0
    assert found.scores is not None and float(found.scores.abs().max()) == 4.0


def test_beta_beyond_the_floats_is_divergence(settings: Settings, part: Part) -> None:
    config = settings(beta=1e30, beta_unit="absolute")
    source = stage_1(config, part)
    with pytest.raises(TrainingDiverged, match="binary mask of ink, seed 0: .* step 1;"):
        binary.find(config, source, part)


def test_strategies_leave_the_source_alone_and_repeat_themselves(
    settings: Settings, part: Part
) -> None:
    config = settings()
    source = stage_1(config, part)
    before = {name: value.clone() for name, value in source.trained.items()}
    for find in (editor.find, binary.find):
        torch.manual_seed(1)
        first = find(config, source, part)
        torch.manual_seed(2)
        second = find(config, source, part)
        assert first.frozen == second.frozen
        assert first.scores is not None and second.scores is not None
        assert first.scores.equal(second.scores)
    for name, param in source.head.named_parameters():
        assert param.equal(before[name]) and source.trained[name].equal(before[name])


def test_samples_are_independent_of_the_batch_rest(settings: Settings) -> None:
    # 14 rows and 4 samples: the step takes 12.
    draws = torch.Generator().manual_seed(0)
    part = Part(torch.rand(14, 5, generator=draws), torch.arange(14) % 2)
    config = settings(samples=4, mask_steps=3)
    assert binary.find(config, train(config, "s", part, 2, 0), part).frozen.count() == 6, (
        "floor(0.55 * 10 + 0.5)"
    )
