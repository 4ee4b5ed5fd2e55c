"""The step of stochastic gradient descent, in float32, on values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stepped(
    theta, g, held, lr_ptr, lr, momentum, weight_decay, undamped,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """theta and momentum after a step along g; `held`, the momentum before it, may be None."""
    if MAXIMIZE:
        g = -g
    if weight_decay is not None:
        g += weight_decay * theta.to(tl.float32)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    step = g
    buf = g
    if held is not None:
        if not FIRST:
            buf = momentum * held.to(tl.float32) + undamped * g
        step = buf
        if NESTEROV:
            step = g + momentum * buf
    return (theta.to(tl.float32) - lr * step).to(theta.dtype), buf.to(theta.dtype)
