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
from fastmask.ops.masked_linear.reference import linear, linear_grad_input, rows_of
from fastmask.ops.pack import cpu as packing
from fastmask.ops.sample_mask import cpu as sampling
from fastmask.ops.topk_mask import cpu as top

DTYPES = (torch.float32, torch.bfloat16)


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
    if method == "gumbel":
        assert seed is not None
        active = sampling.sample_mask(scores.float(), seed, samples, 0)
    elif method == "topk" and scores.dtype in top.DTYPES:
        assert density is not None
        active = top.topk_mask(scores, density).unsqueeze(0)
    elif method == "threshold" and scores.dtype in packing.DTYPES:
        active = packing.pack(scores, mu).unsqueeze(0)
    else:
        active = reference.draw(scores, seed, method, samples, mu, density)
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
    sampled = method == "gumbel" and output_mask[2] and not rescale
    sampled = sampled and scores.dtype != torch.float64
    rest = [False, output_mask[1], output_mask[2] and not sampled, output_mask[3]]
    dx, dw, dscores, dbias = reference.learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, rest
    )
    if output_mask[0] and off == "zero" and not rescale:
        dx = masked.grad_input(grad, weight, active, groups)
    elif output_mask[0]:
        w = reference.weights_of(weight, active, off, rescale, grad.dtype)
        dx = linear_grad_input(grad, w, groups)
    if sampled:
        assert seed is not None and x is not None
        # Between on and off lies the weight itself, or twice that.
        twice = weight if off == "zero" else 2 * weight
        dscores = _straight_through(grad, x, twice, scores, len(active), groups, seed, tau)
    return dx, dw, dscores, dbias


def _straight_through(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    samples: int,
    groups: Tensor | None,
    seed: Tensor,
    tau: float,
) -> Tensor:
    """Sum over samples of G_s W s(1 - s) / tau, the noise of each drawn again from the counter."""
    weight, logits = weight.contiguous(), scores.float().contiguous()
    out = logits.new_empty(logits.shape)
    for s, rows in enumerate(rows_of(groups, samples, len(x))):
        # Autocast reaches into the backward, where sums stay in float32.
        with torch.autocast("cpu", enabled=False):
            g = (grad[rows].float().T @ x[rows].float()).contiguous()
        _cpu.straight_through(
            g.data_ptr(),
            weight.data_ptr(),
            int(weight.dtype == torch.bfloat16),
            logits.data_ptr(),
            int(seed) % 2**64,
            s,
            tau,
            out.numel(),
            int(s > 0),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out.to(scores.dtype)
