"""Specification of masked_adamw_: torch's AdamW, operation by operation, then a selection.

Each free entry sees the operations of torch.optim.AdamW's for-loop in their order, so that a call with
nothing frozen gives torch's bits. Each frozen entry and its moments are put back by selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.restore_frozen_.reference import as_bools, dense_state, put_back

compact_state = True


def masked_adamw_(
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
) -> None:
    """theta, m, v unchanged where frozen; elsewhere m, v = averages, theta -= lr (wd theta + m / d)."""
    # A number comes as float64; torch computes with a tensor lr in that tensor's own dtype.
    rate = lr.item() if lr.dtype == torch.float64 and lr.device.type == "cpu" else lr
    with (
        dense_state(exp_avgs, params, frozen) as exp_avgs,
        dense_state(exp_avg_sqs, params, frozen) as exp_avg_sqs,
        dense_state(max_exp_avg_sqs, params, frozen) as max_exp_avg_sqs,
    ):
        for i, (param, grad, m, v) in enumerate(
            zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
        ):
            written = [param, m, v, *max_exp_avg_sqs[i : i + 1]]
            bits = frozen[i]
            old = [] if bits is None else [tensor.clone() for tensor in written]
            grad = -grad if maximize else grad
            steps[i].add_(1)
            if weight_decay != 0:
                param.mul_(1 - rate * weight_decay)
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if max_exp_avg_sqs:
                v = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
            # A count on the CPU is read; one on an accelerator never is: a graph can replay the step.
            advance = advance_by_number if steps[i].device.type == "cpu" else advance_by_tensor
            advance(param, m, v, steps[i], rate, beta1, beta2, eps)
            if bits is not None:
                ones = as_bools(bits, param)
                for tensor, before in zip(written, old, strict=True):
                    put_back(tensor, ones, before)


def advance_by_number(
    param: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """theta -= rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps), t read."""
    t = step.item()
    denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
    param.addcdiv_(m, denominator, value=-float(rate / (1 - beta1**t)))


def advance_by_tensor(
    param: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The same with t where it is, as torch does with capturable: rate is folded into the denominator."""
    negative = (rate / (1 - beta1**step)).neg()
    denominator = (v.sqrt() / ((1 - beta2**step).sqrt() * negative)).add_(eps / negative)
    param.addcdiv_(m, denominator)
