"""The sweep: every pair, strategy, start and seed, a row and a mask file as each is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmask import backbones, data
from fastmask.data import Features
from fastmask.report import Row
from fastmask.transfer import source as stage_1
from fastmask.transfer import target as stage_3
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain, prepare
from fastmask.transfer.head import accuracy
from fastmask.transfer.plan import Group, Run, plan, variants
from fastmask.transfer.records import Recorder, describe
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import FIND, Found

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """A finished sweep: its rows, as in results.csv, and its folder."""

    rows: tuple[Row, ...]
    folder: Path
    config: Config


@dataclass(frozen=True, eq=False)
class _Learned:
    """A source-trained head, its test accuracy, and its masks by strategy and setting."""

    source: Source
    before: float
    masks: dict[tuple[str, str], Found]


def run(
    config: Config,
    progress: Progress | None = None,
    *,
    features: Mapping[str, Features] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Result:
    """Train on each source, find what it needs, freeze that, fine-tune on each target, test on both.

    The run folder `config.out` is claimed before any work, and every row and mask is on the disk as soon
    as it is finished: an error or Ctrl-C loses only the run that was going on.

    Args:
        config: all settings.
        progress: called with a label, things done and things in all.
        features: features by domain in place of those of `config.data` and `config.backbone`.
        classes: names of the classes, with `features`; None numbers them.

    Returns:
        Rows and folder.

    Raises:
        RunFolderError: the folder cannot be written to, or holds something already.
        DataError, WeightsError, MissingPackage: data or backbone cannot be used (see fastmask.data).
        ValueError: a domain is unknown, or a source has fewer rows than a batch has masks.
        TrainingDiverged: a loss or logit left the finite numbers; names run and step.
        FrozenEntriesMoved: a frozen entry moved, which would be a fault in fastmask.
        KeyboardInterrupt: after Ctrl-C; says what is kept.

    Deterministic: given settings and features, whatever the number of threads. A run's result does not
        depend on which other runs the sweep has, nor on their order.
    Source: arXiv 2308.13957, 3 to 6.
    """
    device = _device(config.device)
    recorder = Recorder(config)
    try:
        features, classes, of_data = _features(config, features, classes, progress)
        domains = prepare(features, classes, config.holdout > 0, device)
        groups = plan(config, tuple(domains))
        _check_samples(config, domains, groups)
        planned = sum(len(group.runs) for group in groups)
        recorder.environment(describe(config, domains, classes, planned, of_data))
    except BaseException:
        recorder.discard()
        raise
    try:
        with _one_thread():
            learned = _learn(config, domains, classes, groups, recorder, progress)
            _fine_tune(config, domains, groups, learned, recorder, progress)
        recorder.metric("finished", runs=len(recorder.rows))
    except KeyboardInterrupt:
        kept = f"{len(recorder.rows)} of {planned} runs are kept in {recorder.folder}"
        recorder.metric("interrupted", runs=len(recorder.rows))
        raise KeyboardInterrupt(kept) from None
    except Exception as error:
        recorder.metric("failed", error=f"{type(error).__name__}: {error}", runs=len(recorder.rows))
        raise
    finally:
        recorder.close()
    return Result(tuple(recorder.rows), recorder.folder, config)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one CPU thread, and as before afterwards.

    Heads are small: a step of 64 rows by 1,280 features by 7 classes takes less time on one thread than
    several take to meet, most of all on a busy machine, and sums do not depend on how many there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _learn(
    config: Config,
    domains: Mapping[str, Domain],
    classes: tuple[str, ...],
    groups: tuple[Group, ...],
    recorder: Recorder,
    progress: Progress | None,
) -> dict[tuple[str, int], _Learned]:
    """Stages 1 and 2: a head and its masks for each source and seed, shared by all targets."""
    keys = list(dict.fromkeys((run.source, run.seed) for group in groups for run in group.runs))
    found: dict[tuple[str, int], _Learned] = {}
    for done, (domain, seed) in enumerate(keys):
        _say(progress, "source heads and their masks", done, len(keys))
        part, test = domains[domain].train, domains[domain].test
        source = stage_1.train(config, domain, part, len(classes), seed)
        before = accuracy(source.head, test.x, test.y)
        recorder.metric("source", source=domain, seed=seed, loss=source.loss, accuracy=before)
        masks: dict[tuple[str, str], Found] = {}
        for strategy, setting in _masks(config):
            found_mask = FIND[strategy](config.at(setting), source, part)
            masks[strategy, setting] = found_mask
            recorder.mask(source, strategy, setting, found_mask, classes)
        found[domain, seed] = _Learned(source, before, masks)
    _say(progress, "source heads and their masks", len(keys), len(keys))
    return found


def _masks(config: Config) -> tuple[tuple[str, str], ...]:
    """(strategy, setting) of every mask of a source."""
    found = dict.fromkeys((strategy, setting) for strategy, _, setting in variants(config))
    return tuple(key for key in found if key[0] in config.strategies)


def _fine_tune(
    config: Config,
    domains: Mapping[str, Domain],
    groups: tuple[Group, ...],
    learned: Mapping[tuple[str, int], _Learned],
    recorder: Recorder,
    progress: Progress | None,
) -> None:
    """Stage 3: group after group; runs of a group share rows and their order."""
    planned = sum(len(group.runs) for group in groups)
    for group in groups:
        for run in group.runs:
            _say(progress, "fine-tuning on targets", len(recorder.rows), planned)
            row, loss = _one(config, domains, learned[run.source, run.seed], run)
            recorder.row(row, loss)
    _say(progress, "fine-tuning on targets", planned, planned)


def _one(
    config: Config, domains: Mapping[str, Domain], learned: _Learned, run: Run
) -> tuple[Row, float]:
    """Fine-tune and test one run."""
    found = learned.masks.get((run.strategy, run.setting))
    frozen = None if found is None else found.frozen
    head, loss = stage_3.fine_tune(config, learned.source, run, domains[run.target].train, frozen)
    on = {
        name: accuracy(head, domains[name].test.x, domains[name].test.y)
        for name in (run.source, run.target)
    }
    row = Row(
        run.source,
        run.target,
        run.strategy,
        run.start,
        run.seed,
        0.0 if frozen is None else frozen.density,
        on[run.source],
        on[run.target],
        learned.before,
        run.setting,
    )
    return row, loss


def _features(
    config: Config,
    features: Mapping[str, Features] | None,
    classes: tuple[str, ...] | None,
    progress: Progress | None,
) -> tuple[Mapping[str, Features], tuple[str, ...], dict[str, str]]:
    """Features, class names, and what environment.json says of where they came from."""
    if features is not None:
        if classes is None:
            most = max((int(f.y.max()) for f in features.values() if len(f.y)), default=-1)
            classes = tuple(str(i) for i in range(most + 1))
        return features, classes, {"data": "features given in memory"}
    if classes is not None:
        raise ValueError("classes: they go with features; data has names of its own")
    domains = data.load(
        config.data, test_fraction=config.test_fraction, splits=config.splits, progress=progress
    )
    config.pairs(domains.domains)
    backbone = backbones.load(
        config.backbone_name, config.weights, config.device, cache=config.cache, progress=progress
    )
    found = data.extract(
        domains,
        backbone,
        config.cache,
        config.split_seed,
        holdout=config.holdout,
        progress=progress,
    )
    said = {
        "data": domains.name,
        "data_fingerprint": domains.fingerprint,
        "backbone": backbone.name,
        "backbone_weights": backbone.weights,
        "backbone_fingerprint": backbone.fingerprint,
    }
    return found, domains.classes, said


def _check_samples(
    config: Config, domains: Mapping[str, Domain], groups: tuple[Group, ...]
) -> None:
    if "binary" not in config.strategies:
        return
    for name in dict.fromkeys(run.source for group in groups for run in group.runs):
        if (n := len(domains[name].train.y)) < config.samples:
            raise ValueError(
                f"samples: expected at most the {n} training rows of {name}, got {config.samples}"
            )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that works here, got {name!r} ({why})") from error
    return device


def _say(progress: Progress | None, label: str, done: int, total: int) -> None:
    if progress is not None:
        progress(label, done, total)
