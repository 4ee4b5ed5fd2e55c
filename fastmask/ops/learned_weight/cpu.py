"""The CPU engine's learned_weight: sampled by the engine; the rule of the weight is the reference's."""

from __future__ import annotations

from torch import Tensor

from fastmask.ops.learned_linear import reference
from fastmask.ops.learned_weight.reference import learned_weight_grad as learned_weight_grad
from fastmask.ops.sample_mask import cpu as sampling


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
    if method == "gumbel":
        assert seed is not None
        active = sampling.sample_mask(scores.float(), seed, samples, 0)
    else:
        active = reference.draw(scores, seed, method, samples, mu, density)
    return reference.weights_of(weight, active, off, rescale, weight.dtype).contiguous(), active
