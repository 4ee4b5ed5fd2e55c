"""The editor mask for several sources, seeds and settings at once, their edits stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastmask.errors import TrainingDiverged
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.grouped.binary import Problem
from fastmask.transfer.head import MASKED
from fastmask.transfer.strategies import editor
from fastmask.transfer.strategies.found import Found

# Adam's own, and the epsilon of strategies.editor.
_KEEP, _KEEP_SQUARE, _EPSILON = 0.9, 0.999, 1e-12


def find(problems: Sequence[Problem]) -> list[Found]:
    """Do what `strategies.editor.find` does for each problem, for those with as many rows and steps as one.

    With the gradient written out, P = softmax((W + dW) x + b) - wanted, and Adam's step by hand: its length
    is in std(W), another for each source. A problem whose loss has left its tolerance takes no more part.

    Args:
        problems: of one sweep: their settings differ in those named `editor_*` alone.

    Returns:
        What was found, in the order of the problems.

    Raises:
        TrainingDiverged: a loss is not finite; names source, seed and step.

    Warns:
        MaskWarning: as `strategies.editor.find`.
    """
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        same.setdefault(_learned_alike(problem), []).append(i)
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for places in same.values():
        config, part = problems[places[0]].config, problems[places[0]].part
        shape = min(config.batch, len(part.y)), config.editor_steps
        alike.setdefault(shape, []).append(places)
    found: list[Found | None] = [None] * len(problems)
    for many in alike.values():
        stack = _Stack([problems[places[0]] for places in many])
        for places, (edit, notes) in zip(many, stack.train(), strict=True):
            for i in places:
                config = problems[i].config
                frozen = editor.least_edited(edit.abs(), config, _name(problems[i]))
                found[i] = Found(frozen, edit, notes)
    return [result for result in found if result is not None]


def _learned_alike(problem: Problem) -> tuple[Any, ...]:
    """What decides an edit; problems that differ in what they freeze alone have learned the same."""
    config, source = problem.config, problem.source
    knobs = config.editor_beta, config.editor_steps, config.editor_tolerance
    return source.domain, source.seed, knobs


def _name(problem: Problem) -> str:
    return f"editor mask of {problem.source.domain}, seed {problem.source.seed}"


class _Stack:
    """U problems with as many rows a step and steps: edits (U, N, K)."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems, self.config = problems, problems[0].config
        config = self.config
        self.weight = torch.stack([p.source.trained[MASKED] for p in problems])
        self.bias = torch.stack([p.source.trained["output.bias"] for p in problems])
        N = self.weight.shape[1]
        std = self.weight.flatten(1).std(1).view(-1, 1, 1)
        self.unit, self.cap = std, config.editor_cap * std
        rows, wanted, first, self.everything, places = [], [], [], [], []
        offset = 0
        for problem, unit in zip(problems, std, strict=True):
            head, part = problem.source.head, problem.part
            own = head.last_input(head.inputs(part.x))
            rows.append(own)
            labels = functional.one_hot(part.y, N).to(own)
            wanted.append(
                labels if config.editor_preserve == "ce" else torch.softmax(head.output(own), 1)
            )
            draws = generator(problem.source.seed, "editor", problem.source.domain)
            noise = torch.randn(self.weight.shape[1:], generator=draws)
            first.append((noise * (config.editor_init * float(unit))).to(own))
            every = torch.randperm(len(part.y), generator=draws)[: editor.ROWS]
            self.everything.append(every.to(own.device) + offset)
            order = orders(len(part.y), config.batch, config.editor_steps, draws)
            places.append(torch.stack(list(order)) + offset)
            offset += len(part.y)
        self.rows, self.wanted = torch.cat(rows).detach(), torch.cat(wanted).detach()
        # What a divergence has over a cross-entropy; 0 for labels.
        self.entropy = torch.special.entr(self.wanted).sum(1)
        self.first = torch.stack(first)
        self.order = torch.stack(places, 1).to(self.weight.device).unbind()
        self.betas = self.weight.new_tensor([p.config.editor_beta for p in problems])
        self.tolerances = self.weight.new_tensor([p.config.editor_tolerance for p in problems])

    @torch.no_grad()
    def train(self) -> list[tuple[Tensor, dict[str, float]]]:
        """Take steps while a problem is within its tolerance; return the last edits within it."""
        config, edit = self.config, self.first.clone()
        mean, square = torch.zeros_like(edit), torch.zeros_like(edit)
        scale: Tensor | None = None
        before = self._losses(torch.zeros_like(edit))
        self._check(before, torch.ones_like(before, dtype=torch.bool), 0)
        within, loss, steps = edit.clone(), before.clone(), torch.zeros_like(before)
        active = torch.ones_like(before, dtype=torch.bool)
        for step, rows in enumerate(self.order, 1):
            grad, batch_loss = self._gradient(edit, rows)
            self._check(batch_loss, active, step - 1)
            push: Tensor | float = 1.0
            if config.editor_beta_unit == "gradient":
                new = grad.abs().mean((1, 2))
                scale = new if scale is None else 0.99 * scale + 0.01 * new
                push = scale
            grad.add_(edit.sign() * (self.betas * push).view(-1, 1, 1))
            mean.lerp_(grad, 1 - _KEEP)
            square.mul_(_KEEP_SQUARE).addcmul_(grad, grad, value=1 - _KEEP_SQUARE)
            length = config.editor_lr * self.unit / (1 - _KEEP**step)
            root = square.sqrt().div_((1 - _KEEP_SQUARE**step) ** 0.5).add_(_EPSILON)
            edit.sub_(length * mean / root)
            torch.minimum(torch.maximum(edit, -self.cap), self.cap, out=edit)
            if step % editor.EVERY == 0 or step == config.editor_steps:
                now = self._losses(edit)
                self._check(now, active, step - 1)
                active &= now <= before + self.tolerances
                within = torch.where(active.view(-1, 1, 1), edit, within)
                loss, steps = torch.where(active, now, loss), torch.where(active, step, steps)
                if not bool(active.any()):
                    break
        return [
            (
                own,
                editor.notes(own, float(cap), int(taken), float(first), float(last)),
            )
            for own, cap, taken, first, last in zip(
                within.clone(), self.cap, steps, before, loss, strict=True
            )
        ]

    def _gradient(self, edit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """dLoss/ddW (U, N, K) of rows (U, B), and the mean loss (U,)."""
        x, wanted = self.rows[rows], self.wanted[rows].transpose(1, 2)
        logits = torch.baddbmm(self.bias.unsqueeze(2), self.weight + edit, x.transpose(1, 2))
        likely = torch.log_softmax(logits, 1)
        loss = -(likely * wanted).sum(1).mean(1) - self.entropy[rows].mean(1)
        push = likely.exp_().sub_(wanted).div_(rows.shape[1])
        return torch.bmm(push, x), loss

    def _losses(self, edit: Tensor) -> Tensor:
        """The mean loss of each problem on its rows, (U,); sources may have different numbers of them."""
        changed = self.weight + edit
        losses = []
        for weight, bias, rows in zip(changed, self.bias, self.everything, strict=True):
            likely = torch.log_softmax(torch.addmm(bias, self.rows[rows], weight.T), 1)
            cross = -(likely * self.wanted[rows]).sum(1).mean()
            losses.append(cross - self.entropy[rows].mean())
        return torch.stack(losses)

    def _check(self, losses: Tensor, active: Tensor, step: int) -> None:
        wrong = active & ~losses.isfinite()
        if bool(wrong.any()):
            u = int(wrong.nonzero()[0])
            raise TrainingDiverged(
                f"{_name(self.problems[u])}: the loss is {float(losses[u])} at step {step + 1}"
            )
