"""Config: what it refuses, and JSON both ways."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmask.transfer.config import STARTS, Config
from fastmask.transfer.plan import plan


@pytest.mark.parametrize(
    "given, named",
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": -1.0}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"tau": math.inf}, "tau"),
        ({"samples": 0}, "samples"),
        ({"samples": 5}, "samples"),
        ({"batch": 0}, "batch"),
        ({"strategies": ("naive", "clever")}, "strategies"),
        ({"strategies": ("naive", "naive")}, "strategies"),
        ({"starts": ("source-middle",)}, "starts"),
        ({"starts": ()}, "starts"),
        ({"beta": -1e-6}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"editor_beta": 0.0}, "editor_beta"),
        ({"editor_beta": 1e-3}, "editor_beta"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": math.nan}, "density"),
        ({"logit_init": 11.0}, "logit_init"),
        ({"logit_clamp": 0.0}, "logit_clamp"),
        ({"reg": "l0"}, "reg"),
        ({"beta_unit": "metre"}, "beta_unit"),
        ({"editor_rule": "mean"}, "editor_rule"),
        ({"editor_preserve": "mse"}, "editor_preserve"),
        ({"editor_cap": 0.0}, "editor_cap"),
        ({"editor_init": 0.0}, "editor_init"),
        ({"editor_share": 1.0}, "editor_share"),
        ({"scaling": "loud"}, "scaling"),
        ({"bn_policy": "shared"}, "bn_policy"),
        ({"hidden": -1}, "hidden"),
        ({"seeds": 0}, "seeds"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"holdout": 1.0}, "holdout"),
        ({"target_lr": math.nan}, "target_lr"),
        ({"target_lr": 1e39}, "target_lr"),
        ({"target_momentum": 1.0}, "target_momentum"),
        ({"target_schedule": "step"}, "target_schedule"),
        ({"sources": ("ink",), "targets": ("ink",)}, "targets"),
    ],
)
def test_values_out_of_range_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        Config(**given)


@pytest.mark.parametrize(
    "given, named",
    [
        ({"tau": "1"}, "tau"),
        ({"tau": True}, "tau"),
        ({"seeds": 2.0}, "seeds"),
        ({"strategies": "naive"}, "strategies"),
        ({"sources": (1,)}, "sources"),
        ({"data": None}, "data"),
        ({"out": ""}, "out"),
        ({"exact_recall": 1}, "exact_recall"),
    ],
)
def test_wrong_types_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=rf"^{named}\b"):
        Config(**given)


def test_json_both_ways() -> None:
    config = Config(
        tau=0.5,
        density=None,
        sources=("ink", "oil"),
        strategies=("binary",),
        out=Path("runs") / "a",
    )
    text = config.to_json()
    assert Config.from_json(text) == config
    assert Config(**json.loads(text)) == config, "lists become tuples, so that json.loads is enough"
    assert Config.from_json("{}") == Config()


@pytest.mark.parametrize("text", ["[]", '{"tua": 1}', "3"])
def test_json_that_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match="^config"):
        Config.from_json(text)


def test_backbone_follows_the_data() -> None:
    assert Config().backbone_name == "digits_cnn"
    assert Config(data="photos").backbone_name == "efficientnet_lite0"
    assert Config(data="photos", backbone="resnet18").backbone_name == "resnet18"


def test_pairs_are_ordered_and_name_what_is_unknown() -> None:
    domains = ("a", "b", "c")
    assert len(Config().pairs(domains)) == 6
    assert Config(sources=("a", "b"), targets=("b",)).pairs(domains) == (("a", "b"),)
    with pytest.raises(ValueError, match=r"sources: expected one of a, b, c, got 'z'"):
        Config(sources=("z",)).pairs(domains)
    with pytest.raises(ValueError, match="two different domains"):
        Config().pairs(("a",))


def test_groups_hold_the_runs_of_one_target_and_seed() -> None:
    config = Config(seeds=2)
    groups = plan(config, ("a", "b", "c", "d"))
    assert [(g.seed, g.target) for g in groups] == [(s, t) for s in (0, 1) for t in "abcd"]
    runs = [run for group in groups for run in group.runs]
    assert len(runs) == len(set(runs)) == 12 * 2 * (2 + 2 + len(STARTS))
    for group in groups:
        assert {(run.target, run.seed) for run in group.runs} == {(group.target, group.seed)}
        assert all(run.source != run.target for run in group.runs)


def test_one_start_is_the_first_in_the_papers_order() -> None:
    runs = plan(Config(starts=("random", "source-end"), seeds=1), ("a", "b"))[0].runs
    assert [(r.strategy, r.start) for r in runs] == [
        ("none", "source-end"),
        ("scratch", "source-start"),
        ("naive", "source-end"),
        ("editor", "source-end"),
        ("binary", "random"),
        ("binary", "source-end"),
    ]


def test_defaults_can_be_asked_for_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from fastmask.transfer import Config; Config()"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
