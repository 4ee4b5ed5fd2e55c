"""The sweep over layers of the backbone: every run end to end, those of a group on the same rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmask.backbones import Backbone
from fastmask.report import Row
from fastmask.report.mask_rows import MaskRow
from fastmask.transfer import inputs, mask_files
from fastmask.transfer.batches import generator
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain
from fastmask.transfer.head import Head
from fastmask.transfer.mask_files import Masked
from fastmask.transfer.network import masks, pictures
from fastmask.transfer.network import source as stage_1
from fastmask.transfer.network import target as stage_3
from fastmask.transfer.network.found import FoundMasks
from fastmask.transfer.network.model import Network, accuracy, choose
from fastmask.transfer.network.source import Source
from fastmask.transfer.plan import Group, Kind, Run, count, in_plan, kinds, plan
from fastmask.transfer.progress import Progress, say
from fastmask.transfer.records import Recorder, describe
from fastmask.transfer.workers import in_order, one_thread


@dataclass(frozen=True, eq=False)
class _Study:
    """What every run needs: the network with the backbone's values, and the pictures."""

    config: Config
    base: Network
    parts: Mapping[str, Domain]


@dataclass(frozen=True, eq=False)
class _Learned:
    """A source-trained network's values, its test accuracy, and its masks with their lines in masks.csv."""

    source: Source
    before: float
    masks: dict[Kind, tuple[FoundMasks, MaskRow]]


def run(
    config: Config, progress: Progress | None = None, resume: bool = False
) -> tuple[tuple[Row, ...], Path]:
    """Do what `fastmask.transfer.run` does where `layers` of the backbone are masked besides the head.

    The backbone is frozen except these layers and, by `bn_policy`, its norms; pictures are held in memory,
    or the outputs of what comes before all that learns, where these are always the same. Norms that are a
    task's own are put back for the source before it is tested again.

    Args:
        config: all settings; `engine` makes no difference, every run is trained by itself.
        progress: called with a label, things done and things in all.
        resume: go on with the interrupted sweep of these settings.

    Returns:
        Rows, and the run folder.

    Raises:
        ValueError: no layer fits `layers`, or one cannot be masked; and what `fastmask.transfer.run` raises.

    Deterministic: given settings and weights: each run is computed on one thread, several beside each other.
    """
    recorder = Recorder(config, resume)
    with one_thread() as workers:
        with recorder.preparing():
            domains, backbone, of_data = inputs.load(config, progress)
            base, said = _network(config, backbone, len(domains.classes))
            parts = pictures.load(config, domains, backbone.transform, base.hold, progress)
            groups = plan(config, domains.domains)
            inputs.check_samples(config, parts, groups)
            plain = describe(config, parts, domains.classes, count(groups), of_data)
            recorder.environment({**plain, **said})
        study = _Study(config, base, parts)
        if backbone.device.type != "cpu":
            workers = 1
        with recorder.running(count(groups)):
            learned = _learn(study, domains.classes, groups, recorder, workers, progress)
            _fine_tune(study, groups, learned, recorder, workers, progress)
    return in_plan(recorder.rows, groups), recorder.folder


def _network(config: Config, backbone: Backbone, classes: int) -> tuple[Network, dict[str, Any]]:
    """The network with the backbone's values, and what environment.json says of it."""
    inner = copy.deepcopy(backbone.module.get_submodule("network"))
    layers = choose(inner, config.layers)
    head = Head(
        backbone.dim, classes, config.hidden, config.scaling, generator(config.seed, "shape")
    )
    network = Network(inner, backbone.transform, layers, head, config.bn_policy)
    network.to(backbone.device)
    fine_tuned = network.parameters_of(masked_alone=not config.train_unmasked)
    return network, {
        "features": backbone.dim,
        "masked": {
            name: list(network.get_parameter(f"{name}.weight").shape) for name in network.masked
        },
        "trained_on_the_source": list(network.parameters_of(masked_alone=False)),
        "trained_on_the_target": list(fine_tuned),
        "batch_norm": network.norms_in_words,
        "threads": {"a run": 1},
    }


def _learn(
    study: _Study,
    classes: tuple[str, ...],
    groups: tuple[Group, ...],
    recorder: Recorder,
    workers: int,
    progress: Progress | None,
) -> dict[tuple[str, int], _Learned]:
    """Stages 1 and 2: values and masks for each source and seed that unfinished runs need."""
    done, keys = recorder.found, recorder.needed(groups, kinds(study.config))
    label = "source networks and their masks"
    found: dict[tuple[str, int], _Learned] = {}
    say(progress, label, 0, len(keys))
    tasks = [partial(_learn_one, study, *key) for key in keys]
    for learned in in_order(tasks, workers):
        source = learned.source
        told = {"source": source.domain, "seed": source.seed, "loss": source.loss}
        recorder.metric("source", **told, accuracy=learned.before)
        for kind, (mask, row) in learned.masks.items():
            if (source.domain, source.seed, kind) not in done:
                densities = {name: own.density for name, own in mask.frozen.items()}
                write = partial(_write, study, source, kind[0], mask, classes)
                recorder.mask(row, {**mask.notes, "densities": densities}, write)
        found[source.domain, source.seed] = learned
        say(progress, label, len(found), len(keys))
    return found


def _learn_one(study: _Study, domain: str, seed: int) -> _Learned:
    part, test = study.parts[domain].train, study.parts[domain].test
    source = stage_1.train(study.config, study.base, domain, part, seed)

    def tested(values: Mapping[str, torch.Tensor]) -> float:
        changed = study.base.with_values({**source.trained, **values})
        return accuracy(changed, test.x, test.y)

    before = tested({})
    found = {}
    for strategy, setting in kinds(study.config):
        own = masks.find(study.config.at(setting), strategy, study.base, source, part)
        kept, inverted = {}, {}
        for name, mask in own.frozen.items():
            frozen, weight = mask.to_bool(), source.trained[name]
            nothing = torch.zeros_like(weight)
            kept[name] = torch.where(frozen, weight, nothing)
            inverted[name] = torch.where(frozen, nothing, weight)
        row = MaskRow(
            domain,
            strategy,
            seed,
            setting,
            own.density,
            own.positive_share if strategy in ("binary", "kl") else None,
            before,
            tested(kept),
            tested(inverted),
        )
        found[strategy, setting] = own, row
    return _Learned(source, before, found)


def _write(
    study: _Study,
    source: Source,
    strategy: str,
    found: FoundMasks,
    classes: tuple[str, ...],
    path: Path,
) -> None:
    """Write a mask's file: with exact recall, with the originals of all that stage 3 may change."""
    config, trained = study.config, source.trained
    moved = study.base.moved_by_stage_3(config.train_unmasked) if config.exact_recall else ()
    masked = {
        name: Masked(mask, trained[name], source.initial[name], found.scores.get(name))
        for name, mask in found.frozen.items()
    }
    originals = {name: trained[name] for name in moved if name not in masked}
    mask_files.write_masks(
        path,
        (source.domain, strategy, source.seed),
        masked,
        classes,
        originals if config.exact_recall else None,
    )


def _fine_tune(
    study: _Study,
    groups: tuple[Group, ...],
    learned: Mapping[tuple[str, int], _Learned],
    recorder: Recorder,
    workers: int,
    progress: Progress | None,
) -> None:
    """Stage 3: every run that is not done."""
    label, planned = "fine-tuning on targets", sum(len(group.runs) for group in groups)
    done = {row.key for row in recorder.rows}
    left = [run for group in groups for run in group.runs if run.key not in done]
    say(progress, label, len(done), planned)
    tasks = [partial(_one, study, learned[run.source, run.seed], run) for run in left]
    for result in in_order(tasks, workers):
        recorder.finished([result])
        say(progress, label, len(recorder.rows), planned)


def _one(study: _Study, learned: _Learned, run: Run) -> tuple[Row, float]:
    """Fine-tune and test one run; norms that are a task's own are those of the domain tested on."""
    masked = learned.masks.get((run.strategy, run.setting))
    found = None if masked is None else masked[0]
    source, target = study.parts[run.source].test, study.parts[run.target]
    frozen = None if found is None else found.frozen
    network, loss = stage_3.fine_tune(
        study.config, study.base, learned.source, run, target.train, frozen
    )
    on_target = accuracy(network, target.test.x, target.test.y)
    network.take_norms(learned.source.trained)
    row = Row(
        run.source,
        run.target,
        run.strategy,
        run.start,
        run.seed,
        0.0 if found is None else found.density,
        accuracy(network, source.x, source.y),
        on_target,
        learned.before,
        run.setting,
    )
    return row, loss
