"""The CPU engine's learned_linear: sampled and multiplied by the engine, the straight-through rule in torch.

Weights that are flipped or rescaled are read by the reference: bits alone do not say what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_linear import reference
from fastmask.ops.masked_linear import cpu as masked
from fastmask.ops.masked_linear.reference import linear, linear_grad_input
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
    rest = [False, *output_mask[1:]]
    found = reference.learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, rest
    )
    if not output_mask[0]:
        return found
    if off == "zero" and not rescale:
        return masked.grad_input(grad, weight, active, groups), *found[1:]
    w = reference.weights_of(weight, active, off, rescale, grad.dtype)
    return linear_grad_input(grad, w, groups), *found[1:]
