"""The stages of a sweep: what is left to do of them, in pieces, and what each leaves in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastmask.report import Row
from fastmask.report.mask_rows import MaskRow
from fastmask.transfer import grouped, mask_files
from fastmask.transfer import source as stage_1
from fastmask.transfer import target as stage_3
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain
from fastmask.transfer.grouped.binary import Problem
from fastmask.transfer.head import MASKED, Head, accuracy
from fastmask.transfer.plan import Group, Kind, Run, kinds
from fastmask.transfer.progress import Progress, say
from fastmask.transfer.records import Recorder
from fastmask.transfer.source import Source, with_values
from fastmask.transfer.strategies import FIND, Found
from fastmask.transfer.workers import in_order

# Sources and seeds whose masks are found as one problem. Fixed, so that what a mask is does not depend on
# how many cores there are or on what an earlier, interrupted sweep has left to do.
_TOGETHER = 3
# The strategies whose masks are found for many problems as one.
_TOGETHER_BY = {grouped.binary.find: ("binary", "kl"), grouped.editor.find: ("editor",)}


@dataclass(frozen=True, eq=False)
class Learned:
    """A source-trained head, its test accuracy, and its masks."""

    source: Source
    before: float
    masks: dict[Kind, Found]


def learn(
    config: Config,
    domains: Mapping[str, Domain],
    classes: tuple[str, ...],
    groups: tuple[Group, ...],
    recorder: Recorder,
    workers: int,
    progress: Progress | None,
) -> dict[tuple[str, int], Learned]:
    """Stages 1 and 2: a head and its masks for each source and seed that unfinished runs need."""
    every = [run for group in groups for run in group.runs]
    keys = list(dict.fromkeys((run.source, run.seed) for run in every))
    done, needed = recorder.found, set(recorder.needed(groups, kinds(config)))
    blocks = [keys[i : i + _TOGETHER] for i in range(0, len(keys), _TOGETHER)]
    blocks = [block for block in blocks if not needed.isdisjoint(block)]
    total = sum(map(len, blocks))
    found: dict[tuple[str, int], Learned] = {}
    say(progress, "source heads and their masks", 0, total)
    tasks = [partial(_learn_block, config, domains, len(classes), block) for block in blocks]
    for results in in_order(tasks, workers):
        for learned in results:
            source = learned.source
            said = {"source": source.domain, "seed": source.seed, "loss": source.loss}
            recorder.metric("source", **said, accuracy=learned.before)
            for kind, mask in learned.masks.items():
                if (source.domain, source.seed, kind) not in done:
                    write = partial(
                        mask_files.write,
                        source=source,
                        strategy=kind[0],
                        found=mask,
                        classes=classes,
                        exact_recall=config.exact_recall,
                        train_unmasked=config.train_unmasked,
                    )
                    row = _mask_row(learned, kind, domains[source.domain])
                    recorder.mask(row, mask.notes, write)
            found[source.domain, source.seed] = learned
        say(progress, "source heads and their masks", len(found), total)
    return found


def fine_tune(
    config: Config,
    domains: Mapping[str, Domain],
    groups: tuple[Group, ...],
    learned: Mapping[tuple[str, int], Learned],
    recorder: Recorder,
    workers: int,
    progress: Progress | None,
) -> None:
    """Stage 3: group after group; runs of a group share rows and their order."""
    planned = sum(len(group.runs) for group in groups)
    done = {row.key for row in recorder.rows}
    left = [group for group in groups if any(run.key not in done for run in group.runs)]
    say(progress, "fine-tuning on targets", len(done), planned)
    one = _grouped if _is_grouped(config) else _looped
    tasks = [partial(one, config, domains, learned, group) for group in left]
    for results in in_order(tasks, workers):
        # A group is trained whole, so that its sums are what they would have been.
        recorder.finished([(row, loss) for row, loss in results if row.key not in done])
        say(progress, "fine-tuning on targets", len(recorder.rows), planned)


def _is_grouped(config: Config) -> bool:
    return config.engine == "grouped" and grouped.target.stackable(config)


def _learn_block(
    config: Config, domains: Mapping[str, Domain], classes: int, keys: Sequence[tuple[str, int]]
) -> list[Learned]:
    """Heads and masks of a few sources and seeds."""
    parts = [domains[domain].train for domain, _ in keys]
    problems = [(domain, part, seed) for (domain, seed), part in zip(keys, parts, strict=True)]
    if config.engine == "grouped":
        sources = grouped.source.train(config, problems, classes)
    else:
        sources = [
            stage_1.train(config, domain, part, classes, seed) for domain, part, seed in problems
        ]
    asked_for = kinds(config)
    masks: list[dict[Kind, Found]] = [{} for _ in keys]
    if config.engine == "grouped":
        for find, strategies in _TOGETHER_BY.items():
            asked = [
                (i, kind) for i in range(len(keys)) for kind in asked_for if kind[0] in strategies
            ]
            problems_of = [
                Problem(strategy, config.at(setting), sources[i], parts[i])
                for i, (strategy, setting) in asked
            ]
            for (i, kind), found in zip(asked, find(problems_of), strict=True):
                masks[i][kind] = found
    for i, own in enumerate(masks):
        for kind in asked_for:
            if kind not in own:
                own[kind] = FIND[kind[0]](config.at(kind[1]), sources[i], parts[i])
    return [
        Learned(
            source,
            accuracy(source.head, domains[domain].test.x, domains[domain].test.y),
            {kind: own[kind] for kind in asked_for},
        )
        for (domain, _), source, own in zip(keys, sources, masks, strict=True)
    ]


def _mask_row(learned: Learned, kind: Kind, domain: Domain) -> MaskRow:
    """How much of the source a mask holds: its accuracy under W, under W * B and under W * (1 - B)."""
    source, found = learned.source, learned.masks[kind]
    frozen, weight = found.frozen.to_bool(), source.trained[MASKED]
    nothing = torch.zeros_like(weight)

    def under(value: torch.Tensor) -> float:
        head = with_values(source.head, {**source.trained, MASKED: value})
        return accuracy(head, domain.test.x, domain.test.y)

    return MaskRow(
        source.domain,
        kind[0],
        source.seed,
        kind[1],
        found.frozen.density,
        found.notes.get("share_positive"),
        learned.before,
        under(torch.where(frozen, weight, nothing)),
        under(torch.where(frozen, nothing, weight)),
    )


def _looped(
    config: Config,
    domains: Mapping[str, Domain],
    learned: Mapping[tuple[str, int], Learned],
    group: Group,
) -> list[tuple[Row, float]]:
    """Runs of a group, one after the other."""
    part = domains[group.target].train
    results = []
    for run in group.runs:
        own = learned[run.source, run.seed]
        found = _found(own, run)
        frozen = None if found is None else found.frozen
        head, loss = stage_3.fine_tune(config, own.source, run, part, frozen)
        results.append((_row(domains, own, run, head), loss))
    return results


def _grouped(
    config: Config,
    domains: Mapping[str, Domain],
    learned: Mapping[tuple[str, int], Learned],
    group: Group,
) -> list[tuple[Row, float]]:
    """Runs of a group as one problem."""
    owns = [learned[run.source, run.seed] for run in group.runs]
    found = [_found(own, run) for run, own in zip(group.runs, owns, strict=True)]
    tasks = [
        (run, own.source, None if mask is None else mask.frozen)
        for run, own, mask in zip(group.runs, owns, found, strict=True)
    ]
    trained = grouped.target.fine_tune(config, tasks, domains[group.target].train)
    return [
        (_row(domains, own, run, head), loss)
        for run, own, (head, loss) in zip(group.runs, owns, trained, strict=True)
    ]


def _row(domains: Mapping[str, Domain], learned: Learned, run: Run, head: Head) -> Row:
    """Test a fine-tuned head on both domains."""
    found = _found(learned, run)
    on = {
        name: accuracy(head, domains[name].test.x, domains[name].test.y)
        for name in (run.source, run.target)
    }
    return Row(
        run.source,
        run.target,
        run.strategy,
        run.start,
        run.seed,
        0.0 if found is None else found.frozen.density,
        on[run.source],
        on[run.target],
        learned.before,
        run.setting,
    )


def _found(learned: Learned, run: Run) -> Found | None:
    """The mask of a run; None for the baselines."""
    return learned.masks.get((run.strategy, run.setting))
