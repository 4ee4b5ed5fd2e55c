"""masked_sgd_: one step of stochastic gradient descent that cannot move frozen entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks, _lists, _tables
from fastmask.ops._register import register


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    frozen: Sequence[Tensor | None] | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    backend: str = "auto",
) -> None:
    """Step: `if frozen: theta, buf unchanged; else buf = mu * buf + (1 - damp) * g, theta -= lr * d`.

    `g = grad + weight_decay * theta` (grad negated to maximize), `d = g + mu * buf` with nesterov, else
    buf; without momentum `d = g`. With `first` buf is written as g (0 where frozen) and not read. Frozen
    entries are selected, not multiplied: they keep their bits whatever theta, grad and buf hold there.

    Args:
        params: n tensors of one floating dtype and device, updated.
        grads: n tensors like params.
        momenta: n tensors like params, updated; None where momentum is 0. Back ends `cpu` and `reference`
            also take compact ones: 1-D, of the free entries alone, in logical order.
        frozen: n packed masks, uint8 (bytes,), 1 = frozen, or None for each; None = nothing is frozen.
        lr: number, or floating tensor of 1 element.
        momentum, weight_decay, dampening: numbers mu, weight_decay, damp.
        nesterov: look ahead; needs momentum > 0 and dampening 0.
        maximize: step up the gradient.
        first: momenta hold nothing yet.
        backend: `auto` or the name of a back end.

    Raises:
        TypeError, ValueError: lists of different lengths; dtype, device or shape do not fit; a number is
            not finite.
        BackendUnavailable: the back end named cannot run.

    Gradients: none; params may require grad.
    Deterministic: yes. Free entries have the bits of torch.optim.SGD's for-loop on the back end
        `reference`, and in float32 on `cpu`. `cpu` in bfloat16, `triton` and `cuda` agree with it within the
        error budget: 16-bit tensors are rounded once a step.
    Source: arXiv 2308.13957, 3 (frozen entries); torch.optim.SGD (free ones).
    """
    rate = _lists.number_or_tensor("lr", lr)
    numbers = sgd_numbers(momentum, weight_decay, dampening, nesterov, maximize, first)
    held = (momenta or ()) if momentum != 0 else ()
    columns = (grads, held if momentum != 0 else None)
    if plain := _tables.plain("masked_sgd_", backend, params, columns, frozen):
        module, rows = plain
        module.masked_sgd_(params, grads, held, frozen, rate, *numbers, rows)
        return
    _lists.updated(params)
    _lists.alike("grads", grads, params)
    bits = _lists.frozen_bits(frozen, params)
    if momentum != 0:
        _lists.state("momenta", held, params, bits)
    if not params:
        return
    with torch.no_grad():
        torch.ops.fastmask.masked_sgd_(
            list(params), list(grads), list(held), bits, rate, *numbers, backend
        )


def sgd_numbers(
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> tuple[float, float, float, bool, bool, bool]:
    """Return the numbers of a step, or raise where one is not finite or nesterov does not fit."""
    momentum = _checks.finite("momentum", momentum)
    weight_decay = _checks.finite("weight_decay", weight_decay)
    dampening = _checks.finite("dampening", dampening)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"nesterov: expected momentum > 0 and dampening 0 with it, got {momentum} and {dampening}"
        )
    return momentum, weight_decay, dampening, nesterov, maximize, first


def _implementation(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    frozen: list[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    backend: str,
) -> None:
    function = "compact_state" if _lists.compact(momenta, params) else None
    module = _backend.resolve("masked_sgd_", backend, params[0].device, params[0].dtype, function)
    module.masked_sgd_(
        params,
        grads,
        momenta,
        frozen,
        lr,
        momentum,
        weight_decay,
        dampening,
        nesterov,
        maximize,
        first,
    )


def _fake(*_: object) -> None:
    return None


register(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] frozen, Tensor lr, "
    "float momentum, float weight_decay, float dampening, bool nesterov, bool maximize, bool first, "
    "str backend) -> ()",
    _implementation,
    _fake,
)
