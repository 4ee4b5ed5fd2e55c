"""Specification of masked_sgd_: torch's SGD, operation by operation, then a selection.

Each free entry sees the operations of torch.optim.SGD's for-loop in their order, so that a call with
nothing frozen gives torch's bits. Each frozen entry is put back by selection: neither a NaN gradient
nor weight decay nor stale momentum can touch it, and NaN and -0.0 stay what they are.
"""

from __future__ import annotations

from torch import Tensor

from fastmask.ops.restore_frozen_.reference import as_bools, dense_state, put_back

compact_state = True


def masked_sgd_(
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
) -> None:
    """theta, buf unchanged where frozen; elsewhere buf = mu buf + (1 - damp) g, theta -= lr d."""
    rate = -lr.item()
    with dense_state(momenta, params, frozen) as momenta:
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            bits = frozen[i]
            ones = None if bits is None else as_bools(bits, param)
            old = None if ones is None else param.clone()
            step = -grad if maximize else grad
            if weight_decay != 0:
                step = step.add(param, alpha=weight_decay)
            if momentum == 0:
                param.add_(step, alpha=rate)
            else:
                buf = momenta[i]
                if first:
                    old_buf = buf.new_zeros(())
                    buf.copy_(step)
                else:
                    old_buf = buf if ones is None else buf.clone()
                    buf.mul_(momentum).add_(step, alpha=1 - dampening)
                param.add_(step.add(buf, alpha=momentum) if nesterov else buf, alpha=rate)
                if ones is not None:
                    put_back(buf, ones, old_buf)
            if ones is not None and old is not None:
                put_back(param, ones, old)
