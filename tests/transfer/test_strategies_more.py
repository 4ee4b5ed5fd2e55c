"""The strategies beside the paper's three: what each freezes, and parity with torch's own pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.data import Features
from fastmask.report import read_run
from fastmask.transfer import Config, run
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import STRATEGIES
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source, train
from fastmask.transfer.strategies import FIND, Found, binary, kl, lowrank, magnitude, random
from fastmask.transfer.variations import KNOBS

Settings = Callable[..., Config]
EPS = torch.finfo(torch.float32).eps
# Widths that no count divides well, and one halfway at 0.5.
SHAPES = {"first": (37, 45), "second": (3, 131), "third": (1, 1)}


@pytest.fixture
def part(features: dict[str, Features]) -> Part:
    given = features["ink"]
    return Part(given.x[given.train], given.y[given.train])


def stage_1(config: Config, part: Part) -> Source:
    return train(config, "ink", part, 3, 0)


def frozen(found: Found) -> Tensor:
    return found.frozen.to_bool()


def weights() -> dict[str, Tensor]:
    """Normal weights no two of which are equal in size, the layers of different spread."""
    draws = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=draws) * 3.0**i
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    sizes = torch.cat([w.abs().flatten() for w in made.values()])
    assert len(sizes.unique()) == len(sizes)
    return made


def torch_keeps(given: Mapping[str, Tensor], method: str, amount: float | int) -> dict[str, Tensor]:
    """What `torch.nn.utils.prune` leaves of the weights."""
    layers = {}
    for name, weight in given.items():
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = nn.Parameter(weight.clone())
    if method == "global":
        prune.global_unstructured(
            [(layer, "weight") for layer in layers.values()],
            pruning_method=prune.L1Unstructured,
            amount=amount,
        )
    else:
        for layer in layers.values():
            getattr(prune, f"{method}_unstructured")(layer, "weight", amount=amount)
    return {name: layer.weight_mask.bool() for name, layer in layers.items()}


# --- kl


def test_kl_measures_from_the_unmasked_outputs_to_the_masked(
    settings: Settings, part: Part
) -> None:
    # One step of 16 rows under 4 masks: drawn again here, and the sum written out in float64.
    config = settings(mask_steps=1, logit_init=0.5)
    source = stage_1(config, part)
    found = kl.find(config, source, part)

    draws = generator(0, "kl", "ink")
    (rows,) = orders(len(part.y), 16, 1, draws)
    seed = int(torch.randint(2**62, (), generator=draws))
    weight = source.trained[MASKED]
    bits = ops.sample_mask(torch.full_like(weight, 0.5), seed, 4)
    x = source.head.inputs(part.x)[rows].double()
    bias = source.trained["output.bias"].double()
    total = 0.0
    for own, batch in zip(bits, x.split(4), strict=True):
        active = BitMask(own, weight.shape).to_bool()
        p = torch.softmax(batch @ weight.double().T + bias, 1)
        q = torch.softmax(batch @ torch.where(active, weight, 0.0).double().T + bias, 1)
        total += float((p * (p / q).log()).sum())
    # Products of 12 terms, a logarithm and a sum over 3 classes, each term at most a few units in size.
    assert found.notes["loss"] == pytest.approx(total / 16, abs=64 * EPS)
    assert total / 16 > 1000 * EPS


def test_kl_looks_at_no_label(settings: Settings, part: Part) -> None:
    config = settings()
    source = stage_1(config, part)
    first = kl.find(config, source, part)
    second = kl.find(config, source, Part(part.x, part.y.flip(0)))
    assert first.scores is not None and second.scores is not None
    assert first.scores.equal(second.scores) and first.frozen == second.frozen
    assert frozen(first).sum() == 20, "floor(0.55 * 36 + 0.5)"
    labelled = binary.find(config, source, Part(part.x, part.y.flip(0)))
    assert labelled.scores is not None
    assert not labelled.scores.equal(binary.find(config, source, part).scores)


def test_kl_keeps_a_weight_that_decides_and_frees_one_that_nothing_uses(
    settings: Settings,
) -> None:
    draws = torch.Generator().manual_seed(3)
    x = torch.zeros(64, 6)
    y = torch.arange(64) % 2
    x[:, 0] = y * 2.0 - 1.0
    x[:, 1:3] = 0.01 * torch.randn(64, 2, generator=draws)
    config = settings(
        density=None, mask_steps=100, mask_lr=0.05, source_steps=50, source_lr=4.0, scaling="none"
    )
    kept = frozen(kl.find(config, train(config, "s", Part(x, y), 2, 0), Part(x, y)))
    assert kept[:, 0].all() and not kept[:, 3:].any()


# --- lowrank


def test_lowrank_edits_the_lower_singular_values_alone(settings: Settings, part: Part) -> None:
    config = settings(editor_steps=30, lowrank_energy=0.5)
    source = stage_1(config, part)
    found = lowrank.find(config, source, part)
    edit, weight = found.scores, source.trained[MASKED].double()
    assert edit is not None
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = found.notes["directions_kept"]
    assert kept == 1 and values[0] ** 2 > 0.5 * (values**2).sum()
    # In the basis of the singular vectors the edit is diagonal, and 0 where they are kept. Singular
    # vectors found in float32 turn by a few eps over the relative gap of their values.
    gap = float((values[:-1] - values[1:]).min() / values[0])
    core = left.T @ edit.double() @ right.T
    most = float(core.abs().max())
    assert float((core - core.diag().diag()).abs().max()) < 16 * EPS / gap * most
    assert abs(float(core[0, 0])) < 16 * EPS / gap * most
    assert float(core.diag()[1:].abs().min()) > 0.01 * most
    assert gap > 0.01


def test_lowrank_freezes_the_least_edited_share(settings: Settings, part: Part) -> None:
    config = settings(editor_share=0.25)
    found = lowrank.find(config, stage_1(config, part), part)
    assert found.scores is not None and found.frozen.count() == 9
    size, kept = found.scores.abs(), frozen(found)
    assert size[kept].max() <= size[~kept].min()


def test_lowrank_says_how_much_of_the_leading_part_is_held(settings: Settings, part: Part) -> None:
    config = settings()
    source = stage_1(config, part)
    found = lowrank.find(config, source, part)
    left, values, right = torch.linalg.svd(source.trained[MASKED])
    lead = int(found.notes["directions_kept"])
    square = (left[:, :lead] @ values[:lead].diag() @ right[:lead]) ** 2
    share = float(square[frozen(found)].sum() / square.sum())
    assert found.notes["lead_kept"] == pytest.approx(share, rel=100 * EPS) and 0 < share < 1


def test_lowrank_holds_its_cap_without_leaving_its_directions(
    settings: Settings, part: Part
) -> None:
    strong = {"editor_steps": 60, "editor_beta": -30.0, "editor_lr": 0.3}
    config = settings(**strong, editor_tolerance=1e6, editor_cap=2.0)
    source = stage_1(config, part)
    found = lowrank.find(config, source, part)
    cap = 2.0 * float(source.trained[MASKED].std())
    assert found.scores is not None
    # Scaled back by a quotient and computed again.
    assert cap * (1 - 16 * EPS) < float(found.scores.abs().max()) < cap * (1 + 16 * EPS)
    assert torch.linalg.matrix_rank(found.scores) <= 3 - found.notes["directions_kept"]
    held = lowrank.find(settings(**strong, editor_tolerance=0.05, editor_cap=1e3), source, part)
    assert held.notes["steps"] < 60
    assert held.notes["loss"] <= held.notes["loss_before"] + 0.05


@pytest.mark.parametrize(
    "energy, expected", [(0.5, 1), (0.64, 1), (0.65, 2), (0.99, 2), (0.999999, 2)]
)
def test_leading_directions_are_the_fewest_that_hold_the_energy(
    energy: float, expected: int
) -> None:
    # Squares 64, 32, 4: shares 0.64, 0.96, 1. The last direction is always left to edit.
    values = torch.tensor([8.0, math.sqrt(32.0), 2.0], dtype=torch.float64)
    assert lowrank.leading(values, energy) == expected
    assert lowrank.leading(values[:1], energy) == 0


# --- magnitude and random


def test_magnitude_freezes_the_largest_of_each_layer_or_of_all() -> None:
    given = {"a": torch.tensor([[1.0, -4.0], [0.5, 2.0]]), "b": torch.tensor([[-8.0, 16.0]])}
    layer = magnitude.masks(given, 0.5, "layer")
    assert layer["a"].to_bool().tolist() == [[False, True], [False, True]]
    assert layer["b"].to_bool().tolist() == [[False, True]]
    both = magnitude.masks(given, 0.5, "global")
    assert both["a"].to_bool().tolist() == [[False, True], [False, False]]
    assert both["b"].to_bool().tolist() == [[True, True]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_equal_weights_are_frozen_from_the_first(scope: str) -> None:
    given = {"a": torch.tensor([[-1.0, 1.0, 1.0]]), "b": torch.tensor([[1.0, -1.0, float("nan")]])}
    found = magnitude.masks(given, 0.5, scope)  # type: ignore[arg-type]
    rows = [mask.to_bool()[0].tolist() for mask in found.values()]
    first_two = [True, True, False]
    assert rows == ([first_two, first_two] if scope == "layer" else [[True] * 3, [False] * 3])


@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.55, 0.9, 1.0])
def test_magnitude_keeps_what_torch_keeps(density: float) -> None:
    given = weights()
    for scope, method in (("layer", "l1"), ("global", "global")):
        found = magnitude.masks(given, density, scope)  # type: ignore[arg-type]
        theirs = torch_keeps(given, method, 1 - density)
        for name, mask in found.items():
            assert mask.to_bool().equal(theirs[name]), (scope, name)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.55, 0.9, 1.0])
def test_random_keeps_as_many_as_torch(density: float) -> None:
    given = weights()
    found = random.masks(given, density, "layer", generator(0, "a test"))
    theirs = torch_keeps(given, "random", 1 - density)
    assert {n: m.count() for n, m in found.items()} == {n: int(m.sum()) for n, m in theirs.items()}
    both = random.masks(given, density, "global", generator(0, "a test"))
    numel = sum(weight.numel() for weight in given.values())
    assert sum(mask.count() for mask in both.values()) == math.floor(density * numel + 0.5)


def test_counts_differ_from_torch_halfway_between_two_alone() -> None:
    # Sixteenths and their products are exact in float64. Halfway, torch rounds what it prunes to even.
    halfway = 0
    for n in range(1, 41):
        weight = torch.randn(1, n, generator=torch.Generator().manual_seed(n))
        for sixteenths in range(17):
            density = sixteenths / 16
            ours = magnitude.masks({"a": weight}, density, "layer")["a"].count()
            theirs = int(torch_keeps({"a": weight}, "l1", 1 - density)["a"].sum())
            lower = math.floor(density * n)
            fewer = density * n - lower == 0.5 and (n - lower) % 2 == 0
            assert theirs == ours - fewer, (n, density)
            halfway += fewer
    assert halfway > 10


def test_random_masks_are_drawn_by_source_and_seed_and_grow(settings: Settings, part: Part) -> None:
    source = stage_1(settings(), part)
    found = {d: frozen(random.find(settings(density=d), source, part)) for d in (0.25, 0.5, None)}
    assert [int(mask.sum()) for mask in found.values()] == [9, 18, 20]
    assert (found[0.5] | ~found[0.25]).all(), "one order, of which a larger share takes more"
    others = [replace(source, seed=1), replace(source, domain="oil")]
    for other in others:
        assert not frozen(random.find(settings(density=0.5), other, part)).equal(found[0.5])
    changed = replace(source, trained={MASKED: source.trained[MASKED] + 1.0})
    assert frozen(random.find(settings(density=0.5), changed, part)).equal(found[0.5])


def test_random_masks_fall_evenly() -> None:
    # Each entry of 2,000 masks of 64 is frozen by a share with standard deviation sqrt(.25 / 2,000).
    given = {str(i): torch.empty(1, 64) for i in range(2_000)}
    found = random.masks(given, 0.5, "layer", generator(0, "a test"))
    share = torch.stack([mask.to_bool()[0] for mask in found.values()]).double().mean(0)
    assert float((share - 0.5).abs().max()) < 5 * math.sqrt(0.25 / 2_000)


def test_magnitude_takes_its_share_where_no_density_is_given(
    settings: Settings, part: Part
) -> None:
    source = stage_1(settings(), part)
    assert magnitude.find(settings(density=None), source, part).frozen.count() == 20
    assert magnitude.find(settings(density=0.25), source, part).frozen.count() == 9


# --- all


@pytest.mark.filterwarnings("ignore:.* l > 0 freezes")
@pytest.mark.parametrize("strategy", sorted(FIND))
def test_every_knob_of_a_strategy_decides_its_mask(
    strategy: str, settings: Settings, part: Part
) -> None:
    config = settings()
    source = stage_1(config, part)
    strong = {"editor_beta": -30.0, "editor_lr": 3.0, "editor_cap": 1e3}
    other = {
        "naive_k": 0.5, "density": 0.3, "beta": 3, "tau": 2, "samples": 2, "logit_init": 0.5,
        "mask_steps": 9, "mask_lr": 0.05, "editor_share": 0.3, "editor_k": 0.5, "editor_beta": -0.1,
        "editor_steps": 3, "editor_tolerance": 1e6, "lowrank_energy": 0.9,
    }  # fmt: skip
    for knob in KNOBS[strategy]:
        # A tolerance is felt by an edit that goes beyond it.
        base = replace(config, **strong) if knob == "editor_tolerance" else config
        usual = FIND[strategy](base, source, part)
        varied = FIND[strategy](base.at(f"{knob}={other[knob]:g}"), source, part)
        same = varied.frozen == usual.frozen and (
            usual.scores is None or usual.scores.equal(varied.scores)
        )
        assert not same, knob


@pytest.mark.filterwarnings("ignore:.*nothing is frozen")
def test_a_sweep_runs_all_strategies_and_repeats_itself(
    settings: Settings, features: dict[str, Features], tmp_path: Path
) -> None:
    def sweep(name: str) -> tuple[tuple[object, ...], Path]:
        config = settings(
            strategies=STRATEGIES,
            starts=("source-start",),
            sources=("ink", "oil"),
            targets=("film", "ink"),
            vary=("density=0.25,0.75", "lowrank_energy=0.9"),
            out=tmp_path / name,
        )
        result = run(config, features=features)
        return result.rows, result.folder

    torch.manual_seed(1)
    rows, folder = sweep("a")
    torch.manual_seed(2)
    again, second = sweep("b")
    assert rows == again
    # Three pairs; two baselines, seven masks, two densities of four and one energy.
    assert len(rows) == 3 * (2 + 7 + 4 * 2 + 1)
    counts = {0.25: 9, 0.55: 20, 0.75: 27}
    for row in rows:
        if row.strategy in ("binary", "kl", "magnitude", "random"):
            density = float(row.setting.partition("=")[2] or 0.55)
            assert row.frozen_density == counts[density] / 36, row
        if row.strategy == "lowrank":
            assert row.frozen_density == 20 / 36

    assert {strategy for _, strategy, _ in read_run(folder).masks} == set(STRATEGIES)
    for path in sorted((folder / "masks").iterdir()):
        held = load_file(path)
        learned = path.name.split("-")[1] in ("editor", "binary", "kl", "lowrank")
        assert (f"{MASKED}.scores" in held) == learned, path.name
        assert path.read_bytes() == (second / "masks" / path.name).read_bytes()


def test_a_source_with_fewer_rows_than_masks_is_refused(
    settings: Settings, features: dict[str, Features]
) -> None:
    config = settings(strategies=("kl",), batch=64, samples=32)
    with pytest.raises(ValueError, match="at most the 30 training rows of oil, got 32"):
        run(config, features=features)
