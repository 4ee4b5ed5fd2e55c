"""masked_adamw_: one step of Adam with decoupled weight decay that cannot move frozen entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks, _lists, _tables
from fastmask.ops._register import register


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    frozen: Sequence[Tensor | None] | None,
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    backend: str = "auto",
) -> None:
    """Step: `if frozen: theta, m, v unchanged, else theta -= lr * (wd * theta + m' / (sqrt(v') + eps))`.

    `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g^2` with g the gradient (negated to
    maximize), `m' = m / (1 - beta1^t)`, `v' = v / (1 - beta2^t)`; with amsgrad v' takes the largest v so
    far. Weight decay, wd, comes first, as torch has it. Frozen entries are selected, not multiplied: they
    keep their bits whatever theta, gradient and moments hold there.

    Args:
        params: n tensors of one floating dtype and device, updated.
        grads: n tensors like params.
        exp_avgs, exp_avg_sqs: m and v, n tensors like params each, updated. Back ends `cpu` and
            `reference` also take compact ones: 1-D, of the free entries alone, in logical order.
        max_exp_avg_sqs: largest v, n tensors like exp_avgs, updated; None without amsgrad.
        steps: n floating tensors of 1 element, t before this step, updated. On the CPU they are read;
            on the device of params they are not, and a CUDA graph can replay the step.
        frozen: n packed masks, uint8 (bytes,), 1 = frozen, or None for each; None = nothing is frozen.
        lr: number, or floating tensor of 1 element.
        beta1, beta2: numbers in [0, 1).
        eps, weight_decay: numbers, at least 0.
        maximize: step up the gradient.
        backend: `auto` or the name of a back end.

    Raises:
        TypeError, ValueError: lists of different lengths; dtype, device or shape do not fit; a number is
            not finite or out of its range.
        BackendUnavailable: the back end named cannot run.

    Gradients: none; params may require grad.
    Deterministic: yes. Free entries have the bits of torch.optim.AdamW's for-loop on the back end
        `reference` alone. `cpu`, `triton` and `cuda` agree with it within the error budget: 16-bit
        tensors are rounded once a step, and on `cpu` no bit depends on the instruction set, the threads or an
        entry's place.
    Source: arXiv 1711.05101 (AdamW); arXiv 1904.09237 (amsgrad); torch.optim.AdamW.
    """
    beta1, beta2 = _below_one("beta1", beta1), _below_one("beta2", beta2)
    eps, weight_decay = _not_negative("eps", eps), _not_negative("weight_decay", weight_decay)
    rate = _lists.number_or_tensor("lr", lr)
    numbers = (rate, beta1, beta2, eps, weight_decay, maximize)
    columns = (grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if plain := _tables.plain("masked_adamw_", backend, params, columns, frozen):
        module, rows = plain
        _counts(steps, params)
        held = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs or ())
        module.masked_adamw_(params, grads, *held, steps, frozen, *numbers, rows)
        return
    _lists.updated(params)
    _lists.alike("grads", grads, params)
    bits = _lists.frozen_bits(frozen, params)
    _lists.state("exp_avgs", exp_avgs, params, bits)
    _lists.state("exp_avg_sqs", exp_avg_sqs, params, bits)
    if max_exp_avg_sqs is not None:
        _lists.state("max_exp_avg_sqs", max_exp_avg_sqs, params, bits)
    _counts(steps, params)
    if not params:
        return
    with torch.no_grad():
        torch.ops.fastmask.masked_adamw_(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(max_exp_avg_sqs or ()),
            list(steps),
            bits,
            *numbers,
            backend,
        )


def _counts(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    _lists.listed("steps", steps, len(params))
    if _lists.scalars(steps):
        return
    for i, (step, param) in enumerate(zip(steps, params, strict=True)):
        _checks.floating(f"steps[{i}]", step)
        if step.numel() != 1:
            raise ValueError(f"steps[{i}]: expected 1 element, got shape {tuple(step.shape)}")
        if step.device.type != "cpu":
            _checks.same(f"steps[{i}]", step, f"params[{i}]", param, dtype=False)


def _below_one(name: str, value: float) -> float:
    number = _not_negative(name, value)
    if number >= 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return number


def _not_negative(name: str, value: float) -> float:
    number = _checks.finite(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    return number


def _implementation(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    frozen: list[Tensor | None],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    backend: str,
) -> None:
    function = "compact_state" if _lists.compact(exp_avgs, params) else None
    module = _backend.resolve("masked_adamw_", backend, params[0].device, params[0].dtype, function)
    module.masked_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        frozen,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
    )


def _fake(*_: object) -> None:
    return None


register(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor?[] frozen, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool maximize, str backend) -> ()",
    _implementation,
    _fake,
)
