"""Specification of learned_weights: learned_weight's rule, one sample, for each weight by itself.

    W'        where(b, W, off) of the weight rounded to the output's dtype, in its own memory format
    gradients those of learned_weight, like the weight and like the scores

A weight whose G is empty, where it is not itself, takes no part in the backward.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastmask.ops.learned_weight import reference
from fastmask.ops.masked_conv2d.reference import laid_out


def one_by_one(
    module: ModuleType,
    weights: list[Tensor],
    scores: list[Tensor],
    seeds: Tensor | None,
    method: str,
    mu: float,
    density: float | None,
    off: str,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `learned_weights` gives, by a back end's learned_weight."""
    chosen, active = [], []
    for i, (weight, own) in enumerate(zip(weights, scores, strict=True)):
        seed = None if seeds is None else seeds[i]
        made, bits = module.learned_weight(
            weight.to(dtype), own, seed, method, 1, mu, density, off, False
        )
        chosen += laid_out(made, weight)
        active.append(bits[0])
    return chosen, active


def one_by_one_grad(
    module: ModuleType,
    grads: list[Tensor],
    weights: list[Tensor],
    scores: list[Tensor],
    active: list[Tensor],
    seeds: Tensor | None,
    method: str,
    tau: float,
    off: str,
    output_mask: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """What `learned_weights_grad` gives, by a back end's learned_weight."""
    of_weights, of_scores = [], []
    for i, (g, weight, own, bits) in enumerate(zip(grads, weights, scores, active, strict=True)):
        wanted = [wish and g.shape == weight.shape for wish in output_mask]
        dw, dscores = weight.new_empty(0), own.new_empty(0)
        if any(wanted):
            seed = None if seeds is None else seeds[i]
            rounded, one = weight.to(g.dtype), bits.unsqueeze(0)
            dw, dscores = module.learned_weight_grad(
                g.unsqueeze(0), rounded, own, one, seed, method, tau, off, False, wanted
            )
        of_weights += laid_out(dw.to(weight.dtype).unsqueeze(0), weight if wanted[0] else dw)
        of_scores += laid_out(dscores.unsqueeze(0), own if wanted[1] else dscores)
    return of_weights, of_scores


def learned_weights(
    weights: list[Tensor],
    scores: list[Tensor],
    seeds: Tensor | None,
    method: str,
    mu: float,
    density: float | None,
    off: str,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """W' of each weight, in its own memory format, and its packed bits (bytes,)."""
    return one_by_one(reference, weights, scores, seeds, method, mu, density, off, dtype)


def learned_weights_grad(
    grads: list[Tensor],
    weights: list[Tensor],
    scores: list[Tensor],
    active: list[Tensor],
    seeds: Tensor | None,
    method: str,
    tau: float,
    off: str,
    output_mask: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """dL/dW and dL/dscores of each G = dL/dW'; those not asked for are empty."""
    return one_by_one_grad(
        reference, grads, weights, scores, active, seeds, method, tau, off, output_mask
    )
