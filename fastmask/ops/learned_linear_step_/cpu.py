"""The CPU engine's learned_linear_step_: scores are stepped where their gradient is summed, 64 at a time.

Float32 scores; others get a gradient of their own, and then a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops._tables import written_back
from fastmask.ops.learned_linear import cpu as learned
from fastmask.ops.learned_linear_step_.reference import SCORES
from fastmask.ops.masked_linear import cpu as masked
from fastmask.ops.masked_sgd_ import cpu as engine
from fastmask.ops.masked_sgd_ import reference as plain

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
    held = [] if momenta is None else [momenta]
    if scores.dtype != torch.float32:
        g = learned.learned_linear_grad(
            grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, SCORES
        )[2]
        sgd = engine if scores.dtype in engine.DTYPES else plain
        sgd.masked_sgd_([scores], [g], held, [None], lr, *numbers)
        return
    a = learned._scales(active, weight) if rescale else None
    shifts = None if a is None else learned._through(grad, x, weight, active, groups, a, None)
    weight = weight.contiguous()
    rows, starts, order = masked._by_mask(x, groups, len(active))
    grad = grad.contiguous() if order is None else grad[order]
    with written_back([scores], held) as ((theta,), buf):
        _cpu.straight_through_step(
            grad.data_ptr(),
            rows.data_ptr(),
            weight.data_ptr(),
            masked._kind(weight),
            int(seed is not None),
            0 if seed is None else int(seed) % 2**64,
            masked._address(starts),
            len(active),
            len(rows),
            weight.shape[0],
            weight.shape[1],
            tau,
            learned._span(off),
            masked._address(a),
            masked._address(shifts),
            theta.data_ptr(),
            buf[0].data_ptr() if buf else 0,
            -lr.item(),
            momentum,
            weight_decay,
            dampening,
            int(nesterov),
            int(maximize),
            int(first),
            torch.get_num_threads(),
        )
