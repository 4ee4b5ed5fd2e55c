"""The CPU engine's learned_weights: one weight after the other, each pass on all threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.learned_weight import cpu as engine
from fastmask.ops.learned_weights.reference import one_by_one, one_by_one_grad

DTYPES = engine.DTYPES


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
    return one_by_one(engine, weights, scores, seeds, method, mu, density, off, dtype)


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
        engine, grads, weights, scores, active, seeds, method, tau, off, output_mask
    )
