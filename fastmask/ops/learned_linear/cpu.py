"""The CPU engine's learned_linear: drawn, multiplied and taught by the engine.

A weight that is masked out is flipped as it is loaded; a scale multiplies the sums of its mask. What goes
through the scale, sum(G * W') of a sample, is x * dL/dx summed over its rows: G is never made. The
gradients of the weight, and those of float64 scores, are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.learned_linear import reference
from fastmask.ops.masked_linear import cpu as masked
from fastmask.ops.pack import cpu as packing
from fastmask.ops.popcount import cpu as counting
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
    a = _scales(active, weight) if rescale else None
    return masked._linear(x, weight, active, bias, groups, off == "flip", a), active


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
    fused = output_mask[2] and scores.dtype != torch.float64
    rest = [False, output_mask[1], output_mask[2] and not fused, False]
    dw, dscores = weight.new_empty(0), scores.new_empty(0)
    if any(rest):
        _, dw, dscores, _ = reference.learned_linear_grad(
            grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, rest
        )
    dbias = grad.sum(dim=0) if output_mask[3] else grad.new_empty(0)
    a = _scales(active, weight) if rescale else None
    wanted = output_mask[0]
    dx = (
        masked._grad_input(grad, weight, active, groups, off == "flip", a)
        if wanted
        else grad.new_empty(0)
    )
    if fused:
        assert x is not None
        here = dx if output_mask[0] and dx.dtype == torch.float32 else None
        shifts = None if a is None else _through(grad, x, weight, active, groups, a, here)
        dscores = _straight_through(
            grad, x, weight, scores, len(active), groups, seed, tau, off, a, shifts
        )
    return dx, dw, dscores, dbias


def weights_of(
    weight: Tensor, active: Tensor, off: str, rescale: bool, dtype: torch.dtype
) -> Tensor:
    """W' (S, *W.shape) of the packed bits, contiguous, rounded once."""
    if off == "zero" and not rescale:
        return masked.select(weight, active).to(dtype)
    a = _scales(active, weight) if rescale else None
    return masked._effective(
        weight.expand(len(active), *weight.shape), active, off == "flip", a
    ).to(dtype)


def _scales(active: Tensor, weight: Tensor) -> Tensor:
    """rsqrt of each mask's density (S), float32; of one entry's where there is none."""
    return torch.sqrt(weight.numel() / counting.popcount(active).clamp(min=1)).float()


def _shifts(a: Tensor, through: Tensor, weight: Tensor) -> Tensor:
    """What the scales take from dL/db, (S): a**2 / (2 N K) * sum(G * W')."""
    return (a.double() ** 2 * through / (2 * max(weight.numel(), 1))).float()


def _through(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    groups: Tensor | None,
    a: Tensor,
    dx: Tensor | None,
) -> Tensor:
    """The shifts (S) of the rows that were multiplied; in float32 whatever the dtype is, as G is."""
    if dx is None:
        dx = masked._grad_input(grad.float(), weight.float(), active, groups, False, a)
    by_row = torch.linalg.vecdot(x.double(), dx.double())
    through = by_row.new_zeros(len(active))
    for s, rows in enumerate(masked.reference.rows_of(groups, len(active), len(x))):
        through[s] = by_row[rows].sum()
    return _shifts(a, through, weight)


def score_grad(
    g: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    tau: float,
    off: str,
    rescale: bool,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dscores from G (S, *W.shape), float32: the rule in one pass.

    It may be written into `out`, which may be the first of G: fresh memory costs more than the rule.
    """
    a = shifts = None
    if rescale:
        a = _scales(active, weight)
        ours = masked._effective(weight.float().expand_as(g), active, False, a)
        through = torch.stack(
            [torch.dot(*both) for both in zip(g.flatten(1), ours.flatten(1), strict=True)]
        )
        shifts = _shifts(a, through, weight)
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
        _span(off),
        masked._address(a),
        masked._address(shifts),
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
    off: str,
    scales: Tensor | None,
    shifts: Tensor | None,
) -> Tensor:
    """Sum over samples of dL/db_s slope_s; a sampled slope's noise is drawn again from the counter."""
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
        _span(off),
        masked._address(scales),
        masked._address(shifts),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(scores.dtype)


def _span(off: str) -> float:
    """What lies between on and off: so many times the weight."""
    return 1.0 if off == "zero" else 2.0
