"""Scores that take their step within the backward: where a gradient would be accumulated, it is used.

A hook of the scores is called when all that a backward has for them is added up. An op that can step
without a gradient hands over how, and no gradient (`ScoreStep.wanted_by`, `defer`). If nothing else reached
the scores in that backward, it steps so; else gradients are computed, added up and stepped along as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Steps scores in place: momenta, lr, momentum, weight_decay, dampening, nesterov, maximize, first.
Take = Callable[..., None]


class Deferred(NamedTuple):
    """What an op hands over: its gradient of the scores, or the step along it with no gradient in between."""

    gradient: Callable[[], Tensor]
    step: Take


class Rule(Protocol):
    """How scores are stepped."""

    accumulates: bool
    scaler: Any

    def take(self, scores: Tensor, take: Take) -> None:
        """Call `take` with momenta and numbers."""

    def along(self, scores: Tensor, grad: Tensor) -> None:
        """Step along a gradient."""


class ScoreStep:
    """The hook of one tensor of scores."""

    def __init__(self, scores: Tensor, rule: Rule) -> None:
        self.rule: Rule | None = rule
        self._deferred: list[Deferred] = []
        self._backward = -1
        self._streams: set[torch.cuda.Stream] = set()
        self._handle = scores.register_post_accumulate_grad_hook(self)

    def remove(self) -> None:
        """Let gradients be accumulated again."""
        self._handle.remove()
        self.rule = None

    def wanted_by(self, node: Any, scores: Tensor, version: int) -> bool:
        """Whether the backward that runs would accumulate what reaches `node`, and no one asks to see it.

        Raises:
            RuntimeError: scores are not those of the forward (`version`) any more.
        """
        if self.rule is None or self.rule.accumulates:
            return False
        if scores._version != version:
            raise RuntimeError(
                "step_in_backward: the scores have changed since the forward, by their step in an earlier "
                "backward or from elsewhere; run the forward again (retain_graph=True keeps a graph, but "
                "not the scores it was computed with)"
            )
        if self.rule.scaler is not None or scores._backward_hooks:
            return False
        try:
            return torch._C._will_engine_execute_node(node)
        except RuntimeError:  # torch.autograd.grad returns this gradient
            return False

    def defer(self, node: Any, scores: Tensor, deferred: Deferred) -> None:
        """Keep until `node`, which would accumulate the gradient, has run."""
        task = torch._C._current_graph_task_id()
        if self._backward != task:
            self._deferred, self._backward = [], task  # what an earlier backward left that raised
        self._deferred.append(deferred)
        if scores.is_cuda:
            self._streams.add(torch.cuda.current_stream(scores.device))
        # Not every version of torch calls a tensor's hooks where there is no gradient; all call a node's.
        if not node.metadata.get(self):
            node.metadata[self] = True
            node.register_hook(lambda *_: self(scores) if self._deferred else None)

    @contextlib.contextmanager
    def _in_order(self, scores: Tensor) -> Iterator[None]:
        """Run behind the streams of what was deferred: autograd waits where it passes gradients on."""
        streams, self._streams = self._streams, set()
        if not streams:
            yield
            return
        here = torch.cuda.current_stream(scores.device)
        for stream in streams - {here}:
            here.wait_stream(stream)
        yield
        for stream in streams - {here}:  # what lies in their memory has been read
            stream.wait_stream(here)

    @torch.no_grad()
    def _settle(self, scores: Tensor, rule: Rule, deferred: list[Deferred]) -> None:
        if len(deferred) == 1 and scores.grad is None:
            rule.take(scores, deferred[0].step)
            return
        for each in deferred:
            grad = each.gradient()
            scores.grad = grad if scores.grad is None else scores.grad.add_(grad)
        assert scores.grad is not None
        rule.along(scores, scores.grad)
        scores.grad = None

    def __call__(self, scores: Tensor) -> None:
        """Step, all gradients being there."""
        deferred, self._deferred = self._deferred, []
        if self._backward != torch._C._current_graph_task_id():
            deferred = []
        rule = self.rule
        if rule is None or rule.accumulates or (not deferred and scores.grad is None):
            return
        _refuse(scores)
        with self._in_order(scores):
            self._settle(scores, rule, deferred)


def step_of(scores: Tensor, dtype: torch.dtype) -> ScoreStep | None:
    """The step that scores take within the backward of an op that computes in `dtype`, if they do.

    None where a graph is traced or transformed: its gradient is accumulated, and stepped along then.

    Raises:
        ValueError: float16 gradients with no scaler named.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    hooks = scores._post_accumulate_grad_hooks
    for hook in hooks.values() if hooks else ():
        if isinstance(hook, ScoreStep) and hook.rule is not None:
            kind = scores.device.type
            low = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
            if hook.rule.scaler is None and torch.float16 in (dtype, low):
                raise ValueError(
                    "scaler: expected the GradScaler that scales the loss where layers compute in float16, "
                    "got None: steps within the backward would be along scaled gradients "
                    "(GradScaler(enabled=False) says that nothing is scaled)"
                )
            return hook
    return None


def _refuse(scores: Tensor) -> None:
    """Raise where a step would not be what it is taken for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "step_in_backward: expected create_graph=False: the scores are stepped in place, and no second "
            "gradient runs through that"
        )
    if len(scores._post_accumulate_grad_hooks or ()) > 1:
        raise RuntimeError(
            "step_in_backward: expected no other hook after the accumulation of these scores' gradient: it "
            "would find none"
        )
    spread = torch.distributed
    if spread.is_available() and spread.is_initialized() and spread.get_world_size() > 1:
        raise RuntimeError(
            f"step_in_backward: expected one process, got {spread.get_world_size()}: each would step its "
            "scores along its own gradient"
        )
