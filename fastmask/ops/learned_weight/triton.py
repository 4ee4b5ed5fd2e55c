"""Triton's learned_weight: a weight is read once for all samples, and again for all gradients.

    W'        a * where(b, W, off) from the packed bits
    gradients dL/dW and dL/dscores in one pass over dL/dW', the noise drawn again

The gradient of float64 scores is the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, philox, tiles, weights
from fastmask.ops.learned_linear.triton import draw, scale
from fastmask.ops.learned_weight import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128


@triton.jit
def _inner(
    grad_ptr, weight_ptr, bits_ptr, sums_ptr, n, size, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    sample = tl.program_id(1).to(tl.int64)
    ones = packed.expand(tl.load(bits_ptr + sample * size + at, mask=at < size, other=0))
    weight = tl.load(weight_ptr + element, mask=element < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + sample * n + element, mask=element < n, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(grad * tiles.select(ones, weight, False), axis=1))
    tl.store(sums_ptr + sample * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def _grads(
    grad_ptr, weight_ptr, scores_ptr, bits_ptr, seed_ptr, scale_ptr, through_ptr, dw_ptr, ds_ptr,
    rate, n, size, samples,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first = packed.start(BLOCK, WIDE)
    at = first + tl.arange(0, BLOCK)
    quad = first * 2 + tl.arange(0, 2 * BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    of_weight = tl.zeros((BLOCK, 8), tl.float32)
    of_scores = tl.zeros((BLOCK, 8), tl.float32)
    for sample in range(samples):
        grad = tl.load(grad_ptr + element, mask=element < n, other=0.0).to(tl.float32)
        a = 1.0
        if scale_ptr is not None:
            a = tl.load(scale_ptr + sample)
        if dw_ptr is not None:
            ones = packed.expand(tl.load(bits_ptr + at, mask=at < size, other=0))
            of_weight += tiles.select(ones, grad, FLIP) * a
        if ds_ptr is not None:
            weight = tl.load(weight_ptr + element, mask=element < n, other=0.0).to(tl.float32)
            if FLIP:
                weight = 2 * weight
            taught = grad * weight
            if scale_ptr is not None:
                taught = taught * a - tl.load(through_ptr + sample)
            if seed_ptr is not None:
                logits = tl.load(scores_ptr + element, mask=element < n, other=0.0).to(tl.float32)
                k24 = philox.uniform24(tl.load(seed_ptr), quad, sample, 0, WIDE)
                taught *= philox.slope(logits, tl.reshape(k24, (BLOCK, 8)), rate, UNIT)
            of_scores += taught
        bits_ptr += size
        grad_ptr += n
    if dw_ptr is not None:
        tl.store(dw_ptr + element, of_weight, mask=element < n)
    if ds_ptr is not None:
        tl.store(ds_ptr + element, of_scores, mask=element < n)


def learned_weight(
    weight: Tensor,
    scores: Tensor,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    """W' (S, *W.shape) of the samples, and their packed bits (S, bytes)."""
    active = draw(scores, seed, method, samples, mu, density)
    n, weight = weight.numel(), weight.contiguous()
    out = torch.empty((len(active), *weight.shape), dtype=weight.dtype, device=weight.device)
    a = scale(active, n) if rescale else None
    weights.write(weight, active, out.view(len(active), n), off == "flip", a)
    return out, active


def learned_weight_grad(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/dscores of G = dL/dW' (S, *W.shape); those not asked for are empty."""
    if scores.dtype not in DTYPES:
        return reference.learned_weight_grad(
            grad, weight, scores, active, seed, method, tau, off, rescale, output_mask
        )
    grad, weight, scores = grad.contiguous(), weight.contiguous(), scores.contiguous()
    (count, size), n = active.shape, weight.numel()
    of_weight, of_scores = output_mask
    dw = weight.new_empty(weight.shape if of_weight else 0)
    dscores = scores.new_empty(scores.shape if of_scores else 0)
    if n == 0 or not any(output_mask):
        return dw, dscores
    blocks, wide = triton.cdiv(size, BYTES), launch.wide(size * 8)
    a, through = scale(active, n) if rescale else None, None
    with launch.on(grad):
        if a is not None and of_scores:
            sums = torch.empty((count, blocks), dtype=torch.float32, device=grad.device)
            _inner[(blocks, count)](
                grad, weight, active, sums, n, size, BLOCK=BYTES, WIDE=wide, enable_fp_fusion=True
            )
            # sum(dL/dW' * W') is a times these.
            through = a * a * a * sums.sum(dim=1) / (2 * n)
        _grads[(blocks,)](
            grad, weight, scores, active, seed, a, through,
            dw if of_weight else None, dscores if of_scores else None,
            1.0 / tau, n, size, count,
            BLOCK=BYTES, UNIT=tau == 1.0, FLIP=off == "flip", WIDE=wide, enable_fp_fusion=True,
        )  # fmt: skip
    return dw, dscores
