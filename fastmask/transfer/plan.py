"""Which runs a sweep has, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fastmask.report import Row
from fastmask.transfer import variations
from fastmask.transfer.config import Config

# A mask of a source: strategy and setting.
Kind = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One fine-tuning; its fields are the key columns of results.csv."""

    source: str
    target: str
    strategy: str
    start: str
    seed: int
    setting: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What its row is found by."""
        return self.source, self.target, self.strategy, self.start, self.seed, self.setting

    def __str__(self) -> str:
        at = f" at {self.setting}" if self.setting else ""
        return (
            f"run {self.source} -> {self.target}, {self.strategy}{at} from {self.start}, "
            f"seed {self.seed}"
        )


@dataclass(frozen=True)
class Group:
    """Runs on the same rows in the same order: one target, one seed.

    They differ in their first values and their masks alone and can be trained as one problem.
    """

    target: str
    seed: int
    runs: tuple[Run, ...]


def plan(config: Config, domains: tuple[str, ...]) -> tuple[Group, ...]:
    """Lay out all ordered pairs x strategies x starts x seeds and the baselines, a group after the other."""
    runs = [
        Run(source, target, strategy, start, seed, setting)
        for seed in config.seed_range
        for source, target in config.pairs(domains)
        for strategy, start, setting in variants(config)
    ]
    runs.sort(key=lambda run: (run.seed, domains.index(run.target)))
    return tuple(
        Group(target, seed, tuple(found))
        for (target, seed), found in groupby(runs, key=lambda run: (run.target, run.seed))
    )


def count(groups: Sequence[Group]) -> int:
    """How many runs there are."""
    return sum(len(group.runs) for group in groups)


def in_plan(rows: Sequence[Row], groups: Sequence[Group]) -> tuple[Row, ...]:
    """Rows in the order of the plan, whenever they were finished."""
    place = {run.key: i for i, run in enumerate(run for group in groups for run in group.runs)}
    return tuple(sorted(rows, key=lambda row: place[row.key]))


def variants(config: Config) -> tuple[tuple[str, str, str], ...]:
    """(strategy, start, setting) of each run of a pair: the baselines, the masks, the masks varied."""
    masked = [
        (strategy, start, "")
        for strategy in config.strategies
        for start in (config.starts if strategy == "binary" else (config.first_start,))
    ]
    varied = [
        (strategy, config.first_start, setting)
        for strategy in config.strategies
        for setting in variations.settings(config.vary, strategy)
    ]
    return (("none", "source-end", ""), ("scratch", "source-start", ""), *masked, *varied)


def kinds(config: Config) -> tuple[Kind, ...]:
    """Every mask that a source has."""
    found = dict.fromkeys((strategy, setting) for strategy, _, setting in variants(config))
    return tuple(kind for kind in found if kind[0] in config.strategies)
