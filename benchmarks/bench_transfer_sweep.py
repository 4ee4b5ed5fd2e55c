"""Runs a second of the transfer study: grouped fine-tuning against a plain PyTorch loop over the same runs.

    python benchmarks/bench_transfer_sweep.py [--features 1280] [--classes 7] [--batch 64] [--repeats 5]

One process, made-up features of four domains of the size of the PACS subset, a mask for each source and
strategy, all ordered pairs. Results are compared before anything is timed: each run's accuracies, at most
one test row apart. The loop is what one writes by hand: `nn.Linear`, `cross_entropy`, `torch.optim.SGD`, and
`torch.where` to put frozen entries back; one thread and all are tried on a few runs, the faster counts. Both
take turns, and the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask import BitMask
from fastmask.data import Features
from fastmask.transfer import Config, grouped, source
from fastmask.transfer.batches import generator, orders, schedule
from fastmask.transfer.domains import Domain, prepare
from fastmask.transfer.head import Head, accuracy
from fastmask.transfer.plan import Group, Run, plan
from fastmask.transfer.source import Source, with_values
from fastmask.transfer.target import start_values
from fastmask.transfer.workers import in_order, one_thread

Tasks = list[grouped.target.Task]

DOMAINS, TRAIN, TEST = ("a", "b", "c", "d"), 392, 168


def features(width: int, classes: int) -> dict[str, Features]:
    """Domains in which a class lights up partly the same features, as pooled activations: none below 0."""
    draws = torch.Generator().manual_seed(0)
    common = torch.randn(classes, width, generator=draws)
    found = {}
    for name in DOMAINS:
        y = torch.randint(classes, (TRAIN + TEST,), generator=draws)
        y[:classes] = torch.arange(classes)
        own = torch.randn(classes, width, generator=draws)
        noise = torch.randn(len(y), width, generator=draws)
        x = torch.relu(0.4 * common[y] + 0.4 * own[y] + noise)
        found[name] = Features(x, y, torch.arange(TRAIN), torch.arange(TRAIN, TRAIN + TEST))
    return found


def tasks_of(config: Config, sources: dict[str, Source], group: Group) -> Tasks:
    """Each run with its source and a random mask of the share that the sweep freezes."""
    found: Tasks = []
    for run in group.runs:
        own = sources[run.source]
        shape = own.trained["output.weight"].shape
        draws = generator(run.seed, run.source, run.strategy)
        frozen = torch.rand(shape, generator=draws) < (config.density or 0.55)
        masked = run.strategy in config.strategies
        found.append((run, own, BitMask.from_bool(frozen) if masked else None))
    return found


def by_hand(
    config: Config, run: Run, own: Source, frozen: BitMask | None, x: Tensor, y: Tensor
) -> Head:
    """One run as one writes it in plain PyTorch."""
    start = start_values(own, run, frozen)
    classes, width = start["output.weight"].shape
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.copy_(start["output.weight"])
        layer.bias.copy_(start["output.bias"])
    layer.bias.requires_grad_(False)
    keep = None if frozen is None else frozen.to_bool()
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(
        [layer.weight], lr=config.target_lr, momentum=config.target_momentum
    )
    draws = generator(run.seed, "target", run.target)
    for step, rows in enumerate(orders(len(y), config.batch, config.target_steps, draws)):
        part = schedule(config.target_schedule, step, config.target_steps)
        optimizer.param_groups[0]["lr"] = config.target_lr * part
        optimizer.zero_grad()
        loss = functional.cross_entropy(layer(x[rows]), y[rows])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{run}: the loss is {loss.item()}")
        loss.backward()
        optimizer.step()
        if keep is not None:
            with torch.no_grad():
                layer.weight.copy_(torch.where(keep, before, layer.weight))
    start["output.weight"] = layer.weight.detach()
    return with_values(own.head, start)


def loop(config: Config, groups: Sequence[Tasks], domains: dict[str, Domain]) -> list[Head]:
    """All runs by hand, one after the other; inputs are scaled once a group."""
    heads = []
    for tasks in groups:
        part = domains[tasks[0][0].target].train
        x = tasks[0][1].head.inputs(part.x)
        heads += [by_hand(config, *task, x, part.y) for task in tasks]
    return heads


def together(config: Config, groups: Sequence[Tasks], domains: dict[str, Domain]) -> list[Head]:
    """All runs by the grouped engine, as a sweep runs them."""

    def one(tasks: Tasks) -> Callable[[], list[tuple[Head, float]]]:
        part = domains[tasks[0][0].target].train
        return lambda: grouped.target.fine_tune(config, tasks, part)

    with one_thread() as workers:
        results = in_order([one(tasks) for tasks in groups], workers)
        return [head for result in results for head, _ in result]


def agree(
    heads: list[Head], others: list[Head], groups: Sequence[Tasks], domains: dict[str, Domain]
) -> None:
    """Raise unless every run's accuracies on source and target are at most one test row apart."""
    runs = [task[0] for tasks in groups for task in tasks]
    for run, head, other in zip(runs, heads, others, strict=True):
        for name in (run.source, run.target):
            test = domains[name].test
            apart = abs(accuracy(head, test.x, test.y) - accuracy(other, test.x, test.y))
            if apart * len(test.y) > 1.5:
                raise SystemExit(f"{run}: accuracies on {name} differ by {apart:.4f}; not timed")


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    config = Config(batch=given.batch, seeds=given.seeds)
    made = features(given.features, given.classes)
    names = tuple(map(str, range(given.classes)))
    domains = prepare(made, names, False, torch.device("cpu"))
    sources = {
        (name, seed): source.train(config, name, domains[name].train, given.classes, seed)
        for name in domains
        for seed in config.seed_range
    }
    groups = [
        tasks_of(config, {name: sources[name, group.seed] for name in domains}, group)
        for group in plan(config, tuple(domains))
    ]
    count, threads = sum(map(len, groups)), torch.get_num_threads()

    def loop_on(n: int, some: Sequence[Tasks] = groups) -> float:
        torch.set_num_threads(n)
        took = timed(lambda: loop(config, some, domains))
        torch.set_num_threads(threads)
        return took

    agree(loop(config, groups, domains), together(config, groups, domains), groups, domains)
    print(
        f"{count} runs of {config.target_steps} steps, {given.features} features x {given.classes} "
        f"classes, batch {given.batch}; {threads} threads, torch {torch.__version__}, {platform.machine()}"
    )
    print("every run's accuracies agree within one test row")
    few = [groups[0][:6]]
    tried = {n: statistics.median(loop_on(n, few) for _ in range(3)) for n in {1, threads}}
    for n, took in sorted(tried.items()):
        print(f"plain loop, {n} thread{'s' if n > 1 else ' '} {6 / took:9.1f} runs/s on 6 runs")
    best = min(tried, key=lambda n: tried[n])
    turns = [
        (timed(lambda: together(config, groups, domains)), loop_on(best))
        for _ in range(given.repeats)
    ]
    fast, slow = (statistics.median(both) for both in zip(*turns, strict=True))
    print(f"plain loop, on {best}    {count / slow:9.1f} runs/s")
    print(f"grouped             {count / fast:9.1f} runs/s")
    ratios = sorted(turn[1] / turn[0] for turn in turns)
    print(
        f"grouped over the loop: {statistics.median(ratios):.1f} times "
        f"(lowest {ratios[0]:.1f}, highest {ratios[-1]:.1f}, {len(ratios)} turns)"
    )


if __name__ == "__main__":
    main()
