"""The sweep: every pair, strategy, start and seed, a row and a mask file as each is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastmask import data
from fastmask.data import Features
from fastmask.report import Row
from fastmask.transfer import inputs, network
from fastmask.transfer.config import Config
from fastmask.transfer.domains import prepare
from fastmask.transfer.plan import count, in_plan, plan
from fastmask.transfer.progress import Progress
from fastmask.transfer.records import Recorder, describe
from fastmask.transfer.stages import fine_tune, learn
from fastmask.transfer.workers import one_thread


@dataclass(frozen=True)
class Result:
    """A finished sweep: its rows, as in results.csv, and its folder."""

    rows: tuple[Row, ...]
    folder: Path
    config: Config


def run(
    config: Config,
    progress: Progress | None = None,
    *,
    features: Mapping[str, Features] | None = None,
    classes: tuple[str, ...] | None = None,
    resume: bool = False,
) -> Result:
    """Train on each source, find what it needs, freeze that, fine-tune on each target, test on both.

    The run folder `config.out` is claimed before any work, and every row and mask is on the disk as soon
    as its group is finished: an error, Ctrl-C or `kill -9` loses only what was going on.

    Args:
        config: all settings.
        progress: called with a label, things done and things in all.
        features: features by domain in place of those of `config.data` and `config.backbone`.
        classes: names of the classes, with `features`; None numbers them.
        resume: go on with the interrupted sweep of these settings in `config.out`. Finished runs are kept
            and not done again; the table ends up as if nothing had been interrupted.

    Returns:
        Rows and folder.

    Raises:
        RunFolderError: the folder cannot be written to, holds something already, or is in use; with
            `resume`, what it holds is another sweep, or rests on other data or another backbone.
        DataError, WeightsError, MissingPackage: data or backbone cannot be used (see fastmask.data).
        ValueError: a domain is unknown, or a source has fewer rows than a batch has masks.
        TrainingDiverged: a loss or logit left the finite numbers; names run and step.
        FrozenEntriesMoved: a frozen entry moved, which would be a fault in fastmask.
        KeyboardInterrupt: after Ctrl-C; says what is kept.

    Deterministic: given settings and features, whatever the number of threads, interrupted or not. With
        `engine="loop"` a run's bits do not depend on which other runs the sweep has; `grouped` adds up in
        an order that does, to the last bits of a float32.
    Source: arXiv 2308.13957, 3 to 6.
    """
    device = inputs.device_of(config.device)
    if config.layers:
        _no_features(features)
        return Result(*network.run(config, progress, resume), config)
    recorder = Recorder(config, resume)
    with recorder.preparing():
        features, classes, of_data = _features(config, features, classes, progress)
        domains = prepare(features, classes, config.holdout > 0, device)
        groups = plan(config, tuple(domains))
        inputs.check_samples(config, domains, groups)
        recorder.environment(describe(config, domains, classes, count(groups), of_data))
    with recorder.running(count(groups)), one_thread() as workers:
        if device.type != "cpu":
            workers = 1
        learned = learn(config, domains, classes, groups, recorder, workers, progress)
        fine_tune(config, domains, groups, learned, recorder, workers, progress)
    return Result(in_plan(recorder.rows, groups), recorder.folder, config)


def _no_features(features: Mapping[str, Features] | None) -> None:
    if features is not None:
        raise ValueError("features: expected none with layers, whose training needs the pictures")


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
        said = {
            "data": "features given in memory",
            "data_fingerprint": inputs.fingerprint(features),
        }
        return features, classes, said
    if classes is not None:
        raise ValueError("classes: they go with features; data has names of its own")
    domains, backbone, said = inputs.load(config, progress)
    found = data.extract(
        domains,
        backbone,
        config.cache,
        config.split_seed,
        holdout=config.holdout,
        progress=progress,
    )
    return found, domains.classes, said
