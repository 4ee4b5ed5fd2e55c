"""Triton's learned_linear: bits are drawn where the weight is read, the noise again where scores are taught.

    forward       bits of a tile of scores, at once selecting the tile of W and stored, 1 bit an entry
    grad input    masked_linear's, from the stored bits
    grad scores   (dY^T X) * (W - off) * s (1 - s) / tau, summed over samples in registers: neither dL/dW'
                  nor W * M, noise or a dense mask is ever in memory; in learned_linear_step_ it steps the
                  scores from there, each program those of its tile, and is not in memory either

Drawing within the forward suits one mask and rows that fit one tile: each entry is then drawn by one program.
More tiles, samples or groups would draw an entry in each of them, so that `sample_mask` draws once and
masked_linear multiplies. The gradient of float64 scores is the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, philox, sgd, tiles
from fastmask.ops._layout import packed_bytes
from fastmask.ops.learned_linear import reference
from fastmask.ops.masked_linear import triton as masked
from fastmask.ops.pack import triton as packing
from fastmask.ops.popcount import triton as counting
from fastmask.ops.sample_mask import triton as sampling
from fastmask.ops.topk_mask import triton as top

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows up to which one tile holds them all.
ONE_TILE = 64


@triton.jit
def _drawn(
    x_ptr, weight_ptr, scores_ptr, seed_ptr, bits_ptr, bias_ptr, y_ptr,
    mu, B, N, K, part,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    FLIP: tl.constexpr, NEAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tiles.columns(BN, WIDE)
    row = tl.arange(0, ROWS)
    split = tl.program_id(1)
    sums = tl.zeros((BN, ROWS), tl.float32)
    for start in range(split * part, tl.minimum(K, (split + 1) * part), BK):
        byte = start // 8 + tl.arange(0, BK // 8)
        places = n[:, None] * (K // 8) + byte[None, :]
        inside = (n < N)[:, None] & (byte * 8 < K)[None, :]
        element = places[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        # Behind the edges scores are -inf and bits 0.
        scores = tl.load(scores_ptr + element, mask=inside[:, :, None], other=float("-inf"))
        scores = scores.to(tl.float32)
        if seed_ptr is None:
            ones = scores > mu
        else:
            quads = tl.reshape(
                places[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], (BN * BK // 4,)
            )
            k24 = philox.uniform24(tl.load(seed_ptr), quads, 0, 0, WIDE)
            ones = philox.drawn(scores, tl.reshape(k24, (BN, BK // 8, 8)), NEAR)
        # A tile changes threads between drawing and the tensor cores: as bytes, not as eight bools each.
        drawn = packed.collect(ones)
        tl.store(bits_ptr + places, drawn, mask=inside)
        k = start + tl.arange(0, BK)
        w = tl.load(
            weight_ptr + n[:, None] * K + k[None, :],
            mask=(n < N)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        w = tiles.select(tl.reshape(packed.expand(drawn), (BN, BK)), w, FLIP)
        x = tl.load(
            x_ptr + row[None, :] * K + k[:, None],
            mask=(k < K)[:, None] & (row < B)[None, :],
            other=0.0,
        )
        sums = tl.dot(w, x, sums, input_precision=PRECISION)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + split.to(tl.int64) * B * N + row[None, :] * N + n[:, None]
    tl.store(out, sums, mask=(n < N)[:, None] & (row < B)[None, :])


@triton.jit
def _grad_scores(
    grad_ptr, x_ptr, weight_ptr, scores_ptr, seed_ptr, scale_ptr, through_ptr, out_ptr,
    ends_ptr, order_ptr, buf_ptr, lr_ptr,
    rate, per, N, K, samples, lr, momentum, weight_decay, undamped,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    QUADS: tl.constexpr, UNIT: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
    STEP: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    n = tiles.columns(BN, WIDE)
    left = tl.program_id(1) * BK
    k = left + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    element = n[:, None] * K + k[None, :]
    total = tl.zeros((BN, BK), tl.float32)
    end = tl.program_id(0).to(tl.int64) * 0
    for sample in range(samples):
        first = end
        if ends_ptr is None:
            end += per
        else:
            end = tl.load(ends_ptr + sample)
        sums = tiles.products(grad_ptr, x_ptr, order_ptr, first, end, n, k, N, K, ROWS, PRECISION)
        w = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
        if FLIP:
            w = 2 * w
        sums *= w
        if scale_ptr is not None:
            sums = sums * tl.load(scale_ptr + sample) - tl.load(through_ptr + sample)
        if seed_ptr is not None:
            logits = tl.load(scores_ptr + element, mask=inside, other=0.0).to(tl.float32)
            seed = tl.load(seed_ptr)
            if QUADS:
                quads = n[:, None] * (K // 4) + (left // 4 + tl.arange(0, BK // 4))[None, :]
                k24 = philox.uniform24(seed, tl.reshape(quads, (BN * BK // 4,)), sample, 0, WIDE)
                k24 = tl.reshape(k24, (BN, BK))
            else:
                k24 = philox.own24(seed, element, sample, 0, WIDE)
            sums *= philox.slope(logits, k24, rate, UNIT)
        total += sums
    if STEP:
        held = None
        if buf_ptr is not None:
            held = total
            if not FIRST:
                held = tl.load(buf_ptr + element, mask=inside, other=0.0)
        theta = tl.load(scores_ptr + element, mask=inside, other=0.0)
        total, buf = sgd.stepped(
            theta,
            total,
            held,
            lr_ptr,
            lr,
            momentum,
            weight_decay,
            undamped,
            NESTEROV,
            MAXIMIZE,
            FIRST,
        )
        if buf_ptr is not None:
            tl.store(buf_ptr + element, buf, mask=inside)
    tl.store(out_ptr + element, total, mask=inside)


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
        logits = scores if scores.dtype in sampling.DTYPES else scores.float()
        return sampling.sample_mask(logits, seed, samples, 0)
    if method == "threshold" and scores.dtype in packing.DTYPES:
        return packing.pack(scores, mu).unsqueeze(0)
    if method == "topk" and scores.dtype in top.DTYPES:
        assert density is not None
        return top.topk_mask(scores, density).unsqueeze(0)
    return reference.draw(scores, seed, method, samples, mu, density)


def scale(active: Tensor, numel: int) -> Tensor:
    """rsqrt of each mask's density, float32 (S,); of one entry's where there is none."""
    return torch.sqrt(numel / counting.popcount(active).clamp(min=1).float())


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
    (B, K), N, flip = x.shape, weight.shape[0], off == "flip"
    by_tile = method != "topk" and not rescale and scores.dtype in DTYPES
    if by_tile and samples == 1 and 0 < B <= ONE_TILE and N > 0 and K > 0 and K % 8 == 0:
        return _draw_and_multiply(x, weight, scores, bias, seed, mu, flip)
    active = draw(scores, seed, method, samples, mu, density)
    a = scale(active, N * K) if rescale else None
    return masked.masked_linear(x, weight, active, bias, groups, flip, a), active


def _draw_and_multiply(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    mu: float,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    """One mask and rows that fit one tile: its bits are used where they are drawn, and stored."""
    (B, K), N = x.shape, weight.shape[0]
    x, weight, scores = x.contiguous(), weight.contiguous(), scores.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    active = torch.empty((1, packed_bytes(N * K)), dtype=torch.uint8, device=x.device)
    active[:, N * K // 8 :] = 0
    # torch compares in the scores' dtype, to which it rounds mu.
    level = torch.tensor(mu, dtype=scores.dtype, device="cpu").item()
    rows, block_n = 16 if B <= 16 else ONE_TILE, 64
    block_k, warps = (16, 4) if x.dtype == torch.float32 else (32, 8)
    # Pipelined, scores of 16 bits beside a weight of 32 spill: in Triton 3.6 with 4 warps, in 3.9 with 8.
    stages = 1 if x.dtype == torch.float32 != scores.dtype else 2
    split = tiles.splits(triton.cdiv(N, block_n), triton.cdiv(K, block_k))
    part = triton.cdiv(triton.cdiv(K, block_k), split) * block_k
    sums = y if split == 1 else torch.empty((split, B, N), dtype=torch.float32, device=x.device)
    with launch.on(x):
        _drawn[(triton.cdiv(N, block_n), split)](
            x, weight, scores, seed, active, bias if split == 1 else None, sums,
            level, B, N, K, part,
            ROWS=rows, BN=block_n, BK=block_k, PRECISION=tiles.precision(x.dtype),
            FLIP=flip, NEAR=philox.NEAR, WIDE=launch.wide(weight.numel()),
            num_warps=warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
        if split > 1:
            tiles.add(sums, bias, y)
    return y, active


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
    of_x, of_weight, of_scores, of_bias = output_mask
    by_kernel = of_scores and scores.dtype in DTYPES
    rest = [False, False, of_scores and not by_kernel, of_bias]
    dx, dw, dscores, dbias = reference.learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, rest
    )
    flip, numel = off == "flip", weight.numel()
    a = scale(active, numel) if rescale else None
    # The gradient through the scale needs sum(dL/dW' * W'), which the gradient of x has at hand.
    inner = grad.new_empty(len(active), dtype=torch.float32) if rescale and by_kernel else None
    if of_x or inner is not None:
        found = masked.grad_input(grad, weight, active, groups, flip, a, x, inner)
        dx = found if of_x else dx
    if of_weight:
        assert x is not None
        dw = masked.grad_weight(grad, x, active, groups, flip, a)
    if by_kernel:
        assert x is not None
        through = None
        if a is not None and inner is not None:
            through = a * a * inner / (2 * max(numel, 1))
        out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        _teach(grad, x, weight, scores, groups, seed, len(active), tau, flip, a, through, out)
        dscores = out
    return dx, dw, dscores, dbias


def _teach(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    seed: Tensor | None,
    samples: int,
    tau: float,
    flip: bool,
    a: Tensor | None,
    through: Tensor | None,
    out: Tensor,
    momenta: Tensor | None = None,
    numbers: tuple[Any, ...] | None = None,
) -> None:
    """The straight-through rule applied to each tile of dY^T X: dL/dscores into out, or a step of scores.

    `numbers` are those of a step: lr, momentum, weight_decay, dampening, nesterov, maximize, first; out is
    then the scores, contiguous like momenta. It is launched once and never tuned: what writes where it reads
    is not run to see how long it takes.
    """
    (B, N), K = grad.shape, x.shape[1]
    grad, x, weight, scores = (t.contiguous() for t in (grad, x, weight, scores))
    if out.numel() == 0:
        return
    rows, stages = (16, 1) if grad.dtype == torch.float32 else (32, 3)
    block = 64
    cut = tiles.cut(groups, samples, B, rows)
    lr, momentum, decay, dampening, nesterov, maximize, first = numbers or (0.0,) * 4 + (False,) * 3
    on_device = isinstance(lr, Tensor)
    # Samples' sums beside their total need more registers than 4 warps have; so does a step where noise is
    # drawn one by one.
    warps = 8 if samples > 1 or (numbers is not None and K % 4 != 0) else 4
    with launch.on(grad):
        _grad_scores[(triton.cdiv(N, block), triton.cdiv(K, block))](
            grad, x, weight, scores, seed, a, through, out, cut.ends, cut.order,
            momenta, lr if on_device else None,
            1.0 / tau, cut.per, N, K, samples,
            0.0 if on_device else float(lr), float(momentum), float(decay) if decay != 0 else None,
            float(1 - dampening),
            ROWS=rows, BN=block, BK=block, PRECISION=tiles.precision(grad.dtype),
            QUADS=K % 4 == 0, UNIT=tau == 1.0, FLIP=flip, WIDE=launch.wide(out.numel()),
            STEP=numbers is not None, NESTEROV=nesterov, MAXIMIZE=maximize, FIRST=first,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
