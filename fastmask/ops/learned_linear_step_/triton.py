"""Triton's learned_linear_step_: the scores of a tile are stepped by the program that sums their gradient.

The step is computed in float32 and rounded when it is stored. With a scale sum(dL/dW' * W') is needed first,
which a gradient of x, made once more, adds up. float64 scores are stepped by the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask._triton import launch
from fastmask.ops._tables import written_back
from fastmask.ops.learned_linear import triton as learned
from fastmask.ops.learned_linear_step_ import reference
from fastmask.ops.masked_linear import triton as masked

DTYPES = learned.DTYPES


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
    numbers = (momentum, weight_decay, dampening, nesterov, maximize, first)
    if scores.dtype not in DTYPES:
        taught = (groups, seed, method, tau, off, rescale)
        reference.learned_linear_step_(
            grad, x, weight, scores, active, momenta, *taught, lr, *numbers
        )
        return
    flip, a, through = off == "flip", None, None
    if rescale:
        a = learned.scale(active, weight.numel())
        inner = grad.new_empty(len(active), dtype=torch.float32)
        masked.grad_input(grad, weight, active, groups, flip, a, x, inner)
        through = a * a * inner / (2 * max(weight.numel(), 1))
    rate = launch.number(lr)
    with written_back([scores], [] if momenta is None else [momenta]) as ((theta,), buf):
        learned._teach(
            grad, x, weight, theta, groups, seed, len(active), tau, flip, a, through, theta,
            buf[0] if buf else None, (rate, *numbers),
        )  # fmt: skip
