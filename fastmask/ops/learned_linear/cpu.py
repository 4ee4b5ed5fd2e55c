"""The CPU engine's learned_linear: drawn, multiplied and taught by the engine.

Weights that are flipped or rescaled are multiplied by the reference: bits alone do not say what they are.
The gradient that goes through the scale, and that of float64 scores, are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.learned_linear import reference
from fastmask.ops.masked_linear import cpu as masked
from fastmask.ops.masked_linear.reference import linear, linear_grad_input
from fastmask.ops.pack import cpu as packing
from fastmask.ops.sample_mask import cpu as sampling
from fastmask.ops.topk_mask import cpu as top

DTYPES = (torch.float32, torch.bfloat16)


def draw(
    scores: Tensor,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
) -> Tensor:
    """The packed bits (S, bytes) that scores decide."""
    if method == "gumbel":
        assert seed is not None
        return sampling.sample_mask(scores.float(), seed, samples, 0)
    if method == "topk" and scores.dtype in top.DTYPES:
        assert density is not None
        return top.topk_mask(scores, density).unsqueeze(0)
    if method == "threshold" and scores.dtype in packing.DTYPES:
        return packing.pack(scores, mu).unsqueeze(0)
    return reference.draw(scores, seed, method, samples, mu, density)


def learned_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    """Rows x (B, K) through W' of each row's sample, (B, N), and the packed bits (S, bytes)."""
    active = draw(scores, seed, method, samples, mu, density)
    if off == "zero" and not rescale:
        return masked.masked_linear(x, weight, active, bias, groups), active
    return linear(
        x, reference.weights_of(weight, active, off, rescale, x.dtype), bias, groups
    ), active


def learned_linear_grad(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dx, dL/dW, dL/dscores, dL/dbias; those not asked for are empty."""
    fused = output_mask[2] and not rescale and scores.dtype != torch.float64
    rest = [False, output_mask[1], output_mask[2] and not fused, output_mask[3]]
    dx, dw, dscores, dbias = reference.learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, rest
    )
    if output_mask[0] and off == "zero" and not rescale:
        dx = masked.grad_input(grad, weight, active, groups)
    elif output_mask[0]:
        w = reference.weights_of(weight, active, off, rescale, grad.dtype)
        dx = linear_grad_input(grad, w, groups)
    if fused:
        assert x is not None
        # Between on and off lies the weight itself, or twice that.
        factor = 1.0 if off == "zero" else 2.0
        dscores = _straight_through(grad, x, weight, scores, len(active), groups, seed, tau, factor)
    return dx, dw, dscores, dbias


def score_grad(
    g: Tensor,
    weight: Tensor,
    scores: Tensor,
    seed: Tensor | None,
    tau: float,
    off: str,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dscores from G (S, *W.shape), float32, where nothing is rescaled: the rule in one pass.

    It may be written into `out`, which may be the first of G: fresh memory costs more than the rule.
    """
    weight, g = weight.contiguous(), g.contiguous()
    logits = None if seed is None else scores.float().contiguous()
    out = scores.new_empty(scores.shape, dtype=torch.float32) if out is None else out
    _cpu.score_grad(
        g.data_ptr(),
        weight.data_ptr(),
        masked._kind(weight),
        masked._address(logits),
        0 if seed is None else int(seed) % 2**64,
        len(g),
        weight.numel(),
        tau,
        1.0 if off == "zero" else 2.0,
        0,
        0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(scores.dtype)


def _straight_through(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    samples: int,
    groups: Tensor | None,
    seed: Tensor | None,
    tau: float,
    factor: float,
) -> Tensor:
    """Sum over samples of factor G_s W slope_s; a sampled slope's noise is drawn again from the counter."""
    weight = weight.contiguous()
    logits = None if seed is None else scores.float().contiguous()
    rows, starts, order = masked._by_mask(x, groups, samples)
    grad = grad.contiguous() if order is None else grad[order]
    out = scores.new_empty(scores.shape, dtype=torch.float32)
    _cpu.straight_through(
        grad.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        masked._kind(weight),
        masked._address(logits),
        0 if seed is None else int(seed) % 2**64,
        masked._address(starts),
        samples,
        len(rows),
        weight.shape[0],
        weight.shape[1],
        tau,
        factor,
        0,
        0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(scores.dtype)
