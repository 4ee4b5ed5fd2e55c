"""Stage 3 for runs on the same rows: their last layers are one matrix, their gradients one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from fastmask.bits import BitMask
from fastmask.errors import TrainingDiverged
from fastmask.optim import verify_frozen
from fastmask.transfer.batches import generator, orders, schedule
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED, Head
from fastmask.transfer.plan import Run
from fastmask.transfer.source import Source, values, with_values
from fastmask.transfer.target import start_values

_BIAS = "output.bias"

# A run, the head it begins from, and the mask of its last layer.
Task = tuple[Run, Source, BitMask | None]


def stackable(config: Config) -> bool:
    """Whether stage 3 leaves the last layer's input alone, so that runs can share it."""
    return not (config.hidden and config.train_unmasked)


def fine_tune(config: Config, tasks: Sequence[Task], part: Part) -> list[tuple[Head, float]]:
    """Do what `transfer.target.fine_tune` does for each task, for R of them as one problem.

    With stacked weights W (R * N, K) and rows X (B, K) of the batch that all share:

        P = softmax over N of (W X^T + b) - onehot(y)        (R * N, B), by B
        V = momentum * V + P X,   0 where frozen             one product, added in place
        W = W - lr * V

    A frozen entry has V = +0, and w - lr * 0 has the bits of w whatever w is. Equal to the loop in exact
    arithmetic; sums over K and B are rounded otherwise.

    Args:
        config: settings named `target_*`, and `train_unmasked`.
        tasks: runs with one target and one seed, each with its source and mask.
        part: the target's training rows.

    Returns:
        For each task the fine-tuned head and the mean loss of its last 20 steps.

    Raises:
        TrainingDiverged: a loss is not finite; names run and step.
        FrozenEntriesMoved: a frozen entry differs, compared as an integer, from what it began with.
    """
    found: list[tuple[Head, float] | None] = [None] * len(tasks)
    for places in _stacks(config, tasks):
        stack = _Stack(config, [tasks[i] for i in places], part)
        for i, result in zip(places, stack.train(config, part), strict=True):
            found[i] = result
    return [result for result in found if result is not None]


def _stacks(config: Config, tasks: Sequence[Task]) -> list[list[int]]:
    """Places of the tasks whose last layers read the same numbers."""
    if config.scaling in ("unit", "none") and not config.hidden:
        return [list(range(len(tasks)))]

    def key(i: int) -> tuple[str, bool]:
        run = tasks[i][0]
        # Scratch goes on from the hidden layer as it was drawn.
        return run.source, bool(config.hidden) and run.strategy == "scratch"

    return [list(places) for _, places in groupby(sorted(range(len(tasks)), key=key), key)]


class _Stack:
    """Runs whose last layers read the same numbers: their weights, one under the other."""

    def __init__(self, config: Config, tasks: Sequence[Task], part: Part) -> None:
        self.tasks = tasks
        self.starts = [start_values(source, run, frozen) for run, source, frozen in tasks]
        self.heads = [
            with_values(source.head, start)
            for (_, source, _), start in zip(tasks, self.starts, strict=True)
        ]
        head = self.heads[0]
        with torch.no_grad():
            self.inputs = head.last_input(head.inputs(part.x))
        self.weight = torch.cat([start[MASKED] for start in self.starts])
        self.bias = torch.cat([start[_BIAS] for start in self.starts])
        # All bits where an entry may move, none where it may not: `and` with it selects.
        kind = torch.int64 if self.weight.dtype == torch.float64 else torch.int32
        self.free = torch.cat(
            [
                torch.full(start[MASKED].shape, -1, dtype=kind, device=self.weight.device)
                if frozen is None
                else frozen.to_bool().to(kind).sub_(1)
                for (_, _, frozen), start in zip(tasks, self.starts, strict=True)
            ]
        )

    @torch.no_grad()
    def train(self, config: Config, part: Part) -> Iterable[tuple[Head, float]]:
        """Take all steps; return the heads and their losses."""
        run = self.tasks[0][0]
        weight, bias, inputs = self.weight, self.bias, self.inputs
        R, N, B = len(self.tasks), len(weight) // len(self.tasks), min(config.batch, len(part.y))
        wanted = functional.one_hot(part.y, N).to(weight.dtype)
        speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
        speed_bits = speed.view(self.free.dtype)
        kept, decay = config.target_momentum, config.target_weight_decay
        losses = weight.new_empty(config.target_steps, R)
        draws = generator(run.seed, "target", run.target)
        for step, order in enumerate(orders(len(part.y), B, config.target_steps, draws)):
            lr = config.target_lr * schedule(config.target_schedule, step, config.target_steps)
            x, onehot = inputs[order], wanted[order].T.unsqueeze(0)
            logits = torch.addmm(bias.unsqueeze(1), weight, x.T).view(R, N, B)
            likely = torch.log_softmax(logits, 1)
            torch.sum(likely * onehot, (1, 2), out=losses[step])
            push = likely.exp_().sub_(onehot).div_(B).view(R * N, B)
            speed.addmm_(push, x, beta=kept)
            if decay:
                speed.add_(weight, alpha=decay)
            # Selected, not multiplied: what is no number must not reach a frozen entry either.
            speed_bits.bitwise_and_(self.free)
            weight.sub_(speed, alpha=lr)
            if config.train_unmasked:
                bias_speed.mul_(kept).add_(push.sum(1)).add_(bias, alpha=decay)
                bias.sub_(bias_speed, alpha=lr)
        losses.div_(-B)
        self._check(losses, config.target_steps)
        return self._results(losses[-20:].mean(0), config.train_unmasked)

    def _check(self, losses: Tensor, steps: int) -> None:
        """Raise TrainingDiverged for the first run whose loss or last weights are not finite."""
        finite = losses.isfinite()
        last = self.weight.view(len(self.tasks), -1).isfinite().all(1)
        for i, (run, _, _) in enumerate(self.tasks):
            if not bool(finite[:, i].all()):
                step = int((~finite[:, i]).nonzero()[0, 0])
                raise TrainingDiverged(
                    f"{run}: the loss is {float(losses[step, i])} at step {step + 1}"
                )
            if not bool(last[i]):
                raise TrainingDiverged(f"{run}: a weight is not finite at step {steps}")

    def _results(self, losses: Tensor, bias_trained: bool) -> list[tuple[Head, float]]:
        N = len(self.weight) // len(self.tasks)
        for head, start, weight, bias, (_, _, frozen) in zip(
            self.heads,
            self.starts,
            self.weight.split(N),
            self.bias.split(N),
            self.tasks,
            strict=True,
        ):
            head.output.weight.copy_(weight)
            head.output.bias.copy_(bias)
            trained = {MASKED, _BIAS} if bias_trained else {MASKED}
            fixed = {
                name: BitMask.ones(value.shape, value.device)
                for name, value in start.items()
                if name not in trained
            }
            if frozen is not None:
                fixed[MASKED] = frozen
            verify_frozen(start, values(head), fixed)
        return list(zip(self.heads, losses.tolist(), strict=True))
