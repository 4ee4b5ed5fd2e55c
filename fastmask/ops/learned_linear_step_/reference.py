"""Specification of learned_linear_step_: learned_linear's gradient of the scores, then masked_sgd_'s step."""

from __future__ import annotations

from torch import Tensor

from fastmask.ops.learned_linear.reference import learned_linear_grad
from fastmask.ops.masked_sgd_.reference import masked_sgd_

# Of the gradients of x, weight, scores and bias that of the scores alone.
SCORES = [False, False, True, False]


def learned_linear_step_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    momenta: Tensor | None,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Scores and momenta after a step along dL/dscores, in place."""
    g = learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, SCORES
    )[2]
    held = [] if momenta is None else [momenta]
    masked_sgd_(
        [scores], [g], held, [None], lr, momentum, weight_decay, dampening, nesterov, maximize, first
    )  # fmt: skip
