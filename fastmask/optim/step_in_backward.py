"""step_in_backward: learned masks whose scores take SGD's step within the backward, with no gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastmask import ops
from fastmask.masks.mask import ScoreMask
from fastmask.ops import _checks, _lists
from fastmask.ops._stepping import ScoreStep, Take
from fastmask.ops.masked_sgd_.op import sgd_numbers


def step_in_backward(
    scores: nn.Module | Iterable[Any],
    lr: float | Tensor = 1e-3,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> SGDInBackward:
    """Step scores as torch.optim.SGD, `theta -= lr * d`, in every `backward()`, in the place of `.grad`.

        optimizer = step_in_backward(model, lr=0.1, momentum=0.9)
        for x, y in batches:
            loss(model(x), y).backward()  # the scores have moved; their .grad is None

    A step is that of the gradient which `backward()` would have accumulated, and gradients of everything
    else are those of the scores before it. Where a call of `learned_linear` (`MaskedLinear`) is all that
    reaches the scores, the step is taken where their gradient is summed: no tensor holds it. Elsewhere
    (convolutions, attention, scores used twice, penalties on them, compiled code) the gradient of one
    tensor of scores at a time exists until its step. Both are the same step: the same bits from the
    reference and, in float32, from the C++ engine.

    - What is returned is a torch.optim.SGD, for schedulers, `param_groups` and state dicts (torch's, both
      ways); its `step()` and `zero_grad()` have nothing to do.
    - `torch.autograd.grad` steps nothing and returns gradients; so does `backward(inputs=...)` without
      the scores.
    - Gradient accumulation: all backwards but the last within `with optimizer.accumulate():`.
    - Clipping by norm does not see these gradients.
    - GradScaler: pass the one that scales the loss. Gradients are unscaled, and an entry moves only where
      its gradient is finite, the others of the step included; leave this optimizer out of
      `scaler.step()`. Without it float16 is refused.
    - Refused in the backward: `create_graph=True`; a second backward through a graph whose scores have
      moved since its forward (`retain_graph=True`); another hook after the accumulation of the scores'
      gradient; several processes. Refused too: `protect`, and hooks of `step()`; copies and pickles
      (keep the state dict). Copies of a model do not step.
    - A backward that raises may have stepped the scores it had come to. With reentrant checkpointing each
      segment is a backward of its own: scores must not be used in two of them.

    Args:
        scores: a module, for the scores of all its learned masks, or parameters as torch.optim.SGD takes
            them: scores of masks, or any leaves that require gradients.
        lr: learning rate, a number or a tensor of 1 element.
        momentum, dampening, weight_decay, nesterov, maximize: as for torch.
        scaler: the GradScaler that scales the loss, or None.

    Returns:
        SGDInBackward, in force until its `remove()`.

    Raises:
        TypeError, ValueError: what torch.optim.SGD refuses; a module with no learned mask; a parameter that
            takes its steps already, is sharded, or is not real floating.

    Source: arXiv 2306.09782 (steps fused into the backward); torch.optim.SGD.
    """
    params: Any = scores
    if isinstance(scores, nn.Module):
        found = (
            m.own_scores()
            for m in scores.modules()
            if isinstance(m, ScoreMask) and m.shape is not None
        )
        params = list(dict.fromkeys(found))
        if not params:
            raise ValueError(
                f"scores: expected a module with learned masks, got {type(scores).__name__} with none"
            )
    return SGDInBackward(
        params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, scaler=scaler
    )


class SGDInBackward(torch.optim.SGD):
    """What `step_in_backward` returns."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        *,
        maximize: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.scaler, self.accumulates = scaler, False
        self._steps: dict[Tensor, tuple[ScoreStep, int]] = {}
        try:
            super().__init__(
                params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
            )
        except BaseException:
            self.remove()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which step within the backward from now on."""
        given = param_group["params"]
        listed = [given] if isinstance(given, Tensor) else list(given)
        for entry in listed:
            _check(entry[1] if isinstance(entry, tuple) else entry)
        super().add_param_group({**param_group, "params": listed})
        for param in self.param_groups[-1]["params"]:
            self._steps[param] = ScoreStep(param, self), len(self.param_groups) - 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Return the closure's loss, if there is a closure; steps are taken by its backward."""
        with torch.enable_grad():
            return None if closure is None else closure()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients in `.grad` within this block; the first backward after it adds and steps."""
        before, self.accumulates = self.accumulates, True
        try:
            yield
        finally:
            self.accumulates = before

    def remove(self) -> None:
        """End it: gradients are accumulated in `.grad` again."""
        for step, _ in self._steps.values():
            step.remove()
        self._steps = {}

    def take(self, scores: Tensor, take: Take) -> None:
        """Call `take` with the momentum of scores and the numbers of their group."""
        group, state = self.param_groups[self._steps[scores][1]], self.state[scores]
        held, first = state.get("momentum_buffer"), False
        if group["momentum"] == 0:
            momenta = None
        elif held is None:
            momenta, first = torch.empty_like(scores), True
        else:
            _lists.alike("momentum_buffer", [held], [scores])
            momenta = held
        lr = _lists.number_or_tensor("lr", group["lr"])
        numbers = sgd_numbers(
            group["momentum"], float(group["weight_decay"]), group["dampening"], group["nesterov"],
            group["maximize"], first,
        )  # fmt: skip
        take(momenta, lr, *numbers)
        # Only now: a step that raises leaves no momentum that was never written.
        if first:
            state["momentum_buffer"] = momenta
        self._opt_called = True  # what a scheduler that is stepped first warns of the lack of

    def along(self, scores: Tensor, grad: Tensor) -> None:
        """Step scores along a gradient, unscaled where there is a scaler."""
        _lists.alike("grad", [grad], [scores])
        frozen = None
        if self.scaler is not None:
            # The scale as a tensor, which is not read here.
            grad = grad / self.scaler.scale(torch.ones((), device=grad.device))
            frozen = ops.pack(~grad.isfinite())

        def take(momenta: Tensor | None, lr: Tensor, *numbers: Any) -> None:
            held = [] if momenta is None else [momenta]
            torch.ops.fastmask.masked_sgd_([scores], [grad], held, [frozen], lr, *numbers, "auto")

        self.take(scores, take)

    def register_step_pre_hook(self, hook: Any) -> NoReturn:
        """Refuse: there is no step to hook."""
        raise TypeError(
            "step_in_backward: expected no hook of step() (protect has them), got one: steps are taken "
            "within the backward"
        )

    register_step_post_hook = register_step_pre_hook

    def __getstate__(self) -> NoReturn:
        raise TypeError("step_in_backward: copies would step nothing; keep its state_dict()")


def _check(param: Any) -> None:
    """Raise unless a parameter can take its steps within the backward."""
    _checks.floating("scores", param)
    if hasattr(param, "placements"):
        raise TypeError("scores: expected whole tensors, got one that is sharded (DTensor)")
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if any(isinstance(hook, ScoreStep) for hook in hooks.values()):
        raise ValueError(
            f"scores: a tensor of shape {tuple(param.shape)} takes its steps in the backward already; "
            "remove() the other first"
        )
