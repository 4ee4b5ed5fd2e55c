"""Specification of learned_linear: bits of the scores, select, a dense product, the straight-through rule.

What concerns the weight alone holds for a weight of any shape and is read by learned_conv2d and
learned_weight too.

b   = sampled, scores > mu, or top-k                         (S, N, K)
a   = sqrt(NK / max(sum b, 1)) with rescale, else 1          one for each sample
W'  = a * where(b, W, off)                                   off = 0, or -W to flip
G   = dY^T X of a sample's rows                              dL/dW'
dL/db     = a * G * (W - off) - a^2 / (2 NK) * sum(G * W')   second term with rescale only
dL/dscore = sum over samples of dL/db * slope                slope = s(1 - s) / tau, or 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.masked_linear.reference import linear, linear_grad_input, linear_grad_weights
from fastmask.ops.pack.reference import pack
from fastmask.ops.sample_mask.reference import noise, sample_mask
from fastmask.ops.topk_mask.reference import topk_mask
from fastmask.ops.unpack.reference import unpack


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 where there is one, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def draw(
    scores: Tensor,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
) -> Tensor:
    """Packed bits (S, bytes) of the scores."""
    if method == "gumbel":
        assert seed is not None
        return sample_mask(scores, seed, samples, 0)
    if method == "topk":
        assert density is not None
        return topk_mask(scores, density).unsqueeze(0)
    return pack(scores, mu).unsqueeze(0)


def scale(ones: Tensor, dtype: torch.dtype) -> Tensor:
    """rsqrt of each sample's density, (S, 1, ...); of one entry's where there is none: it stays finite."""
    count = ones.flatten(1).sum(dim=1).clamp(min=1).view(-1, *[1] * (ones.dim() - 1))
    return torch.sqrt(ones.shape[1:].numel() / count.to(dtype))


def effective(weight: Tensor, ones: Tensor, off: str, a: Tensor | None) -> Tensor:
    """W' = a * where(b, W, off), (S, *W.shape): selected before it is scaled, so that 0 stays 0."""
    selected = torch.where(ones, weight, -weight if off == "flip" else weight.new_zeros(()))
    return selected if a is None else selected * a


def slope(scores: Tensor, seed: Tensor, samples: int, tau: float) -> Tensor:
    """s(1 - s) / tau of the relaxed samples, (S, *scores.shape), their noise drawn again from the counter."""
    dtype = wide(scores)
    n = noise(scores.numel(), seed, samples, 0, dtype).view(samples, *scores.shape)
    z = (scores.to(dtype) + n) / tau
    # sigmoid(-z) is 1 - s without the cancellation.
    return torch.sigmoid(z) * torch.sigmoid(-z) / tau


def bits(active: Tensor, weight: Tensor) -> Tensor:
    """The bits (S, bytes) as bool (S, *W.shape)."""
    return unpack(active, weight.numel()).view(len(active), *weight.shape)


def weights_of(
    weight: Tensor, active: Tensor, off: str, rescale: bool, dtype: torch.dtype
) -> Tensor:
    """W' (S, *W.shape) of the packed bits, rounded to `dtype` once, at the end."""
    ones = bits(active, weight)
    a = scale(ones, wide(weight)) if rescale else None
    return effective(weight, ones, off, a).to(dtype)


def weight_grad(g: Tensor, weight: Tensor, active: Tensor, off: str, rescale: bool) -> Tensor:
    """dL/dW from G (S, *W.shape)."""
    ones = bits(active, weight)
    a = scale(ones, g.dtype) if rescale else None
    return effective(g, ones, off, a).sum(dim=0).to(weight.dtype)


def score_grad(
    g: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
) -> Tensor:
    """dL/dscores from G (S, *W.shape): the straight-through rule."""
    w = weight.to(g.dtype)
    db = g * (2 * w if off == "flip" else w)
    if rescale:
        ones = bits(active, weight)
        a = scale(ones, g.dtype)
        products = g * effective(w, ones, off, a)
        through_a = products.sum(dim=tuple(range(1, g.dim())), keepdim=True)
        db = a * db - a * a / (2 * max(w.numel(), 1)) * through_a
    if method == "gumbel":
        assert seed is not None
        db = db * slope(scores, seed, len(active), tau)
    return db.sum(dim=0).to(scores.dtype)


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
    return linear(x, weights_of(weight, active, off, rescale, x.dtype), bias, groups), active


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
    dx, dw, dbias = (grad.new_empty(0) for _ in range(3))
    dscores = scores.new_empty(0)
    if output_mask[0]:
        dx = linear_grad_input(grad, weights_of(weight, active, off, rescale, grad.dtype), groups)
    if output_mask[1] or output_mask[2]:
        assert x is not None
        dtype = wide(grad, scores)
        g = linear_grad_weights(grad.to(dtype), x.to(dtype), len(active), groups)
    if output_mask[1]:
        dw = weight_grad(g, weight, active, off, rescale)
    if output_mask[2]:
        dscores = score_grad(g, weight, scores, active, seed, method, tau, off, rescale)
    if output_mask[3]:
        dbias = grad.sum(dim=0)
    return dx, dw, dscores, dbias
