"""Triton's masked_linear: W is read through its bits, each mask's rows of x in tiles of their own.

    few rows a mask    y[b, n] = sum_k Wm[n, k] x[b, k] on CUDA cores: W is read once for up to 4 rows
    forward            y^T = Wm x^T: as the left operand a masked tile goes from registers to the tensor cores
    grad input         dx = dy Wm: Wm lies in shared memory; for few rows as dx^T = Wm^T dy^T
    grad weight        dW = sum over masks of where(active, dy^T x, 0)
    many rows          blocks of W are selected into scratch, and torch multiplies (`_triton/scratch.py`)

Where tiles are too few for the device, sums are split into parts that depend on shapes alone and are added
in order: the same inputs give the same bits. `_triton/plan.py` chooses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import launch, scratch, tiles, tune
from fastmask._triton.plan import Plan, dense_first, plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _few(
    x_ptr, weight_ptr, bits_ptr, scale_ptr, bias_ptr, y_ptr, table_ptr, order_ptr,
    count, per, N, K, size,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ALIGNED: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t, tile = tiles.turn(count)
    n = tiles.span(tile, BN, WIDE)
    sample, first, end = tiles.place(t, table_ptr, per, ROWS)
    bits_ptr += sample * size
    row0 = tiles.row(order_ptr, first, end)
    row1 = tiles.row(order_ptr, first + 1, end)
    row2 = tiles.row(order_ptr, first + 2, end)
    row3 = tiles.row(order_ptr, first + 3, end)
    sum0 = tl.zeros((BN, BK), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    # Tiles without rows have nothing to read.
    for start in range(0, tl.where(first < end, K, 0), BK):
        k = start + tl.arange(0, BK)
        w = tiles.weight(weight_ptr, bits_ptr, n, start, N, K, BK, ALIGNED, FLIP).to(tl.float32)
        x = tl.load(x_ptr + row0 * K + k, mask=k < tl.where(first < end, K, 0), other=0.0)
        sum0 += w * x.to(tl.float32)[None, :]
        if ROWS > 1:
            x = tl.load(x_ptr + row1 * K + k, mask=k < tl.where(first + 1 < end, K, 0), other=0.0)
            sum1 += w * x.to(tl.float32)[None, :]
        if ROWS > 2:
            x = tl.load(x_ptr + row2 * K + k, mask=k < tl.where(first + 2 < end, K, 0), other=0.0)
            sum2 += w * x.to(tl.float32)[None, :]
            x = tl.load(x_ptr + row3 * K + k, mask=k < tl.where(first + 3 < end, K, 0), other=0.0)
            sum3 += w * x.to(tl.float32)[None, :]
    bias = tl.zeros((BN,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    a = 1.0
    if scale_ptr is not None:
        a = tl.load(scale_ptr + sample)
    y = tl.sum(sum0, axis=1) * a + bias
    tl.store(y_ptr + row0 * N + n, y, mask=n < tl.where(first < end, N, 0))
    if ROWS > 1:
        y = tl.sum(sum1, axis=1) * a + bias
        tl.store(y_ptr + row1 * N + n, y, mask=n < tl.where(first + 1 < end, N, 0))
    if ROWS > 2:
        y = tl.sum(sum2, axis=1) * a + bias
        tl.store(y_ptr + row2 * N + n, y, mask=n < tl.where(first + 2 < end, N, 0))
        y = tl.sum(sum3, axis=1) * a + bias
        tl.store(y_ptr + row3 * N + n, y, mask=n < tl.where(first + 3 < end, N, 0))


@triton.jit
def _forward(
    x_ptr, weight_ptr, bits_ptr, scale_ptr, bias_ptr, y_ptr, table_ptr, order_ptr,
    count, per, B, N, K, size, part,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t, tile = tiles.turn(count)
    n = tiles.span(tile, BN, WIDE)
    sample, first, end = tiles.place(t, table_ptr, per, ROWS)
    bits_ptr += sample * size
    at = first + tl.arange(0, ROWS)
    row = tiles.row(order_ptr, at, end)
    split = tl.program_id(1)
    sums = tl.zeros((BN, ROWS), tl.float32)
    stop = tl.where(first < end, tl.minimum(K, (split + 1) * part), 0)
    for start in range(split * part, stop, BK):
        k = start + tl.arange(0, BK)
        w = tiles.weight(weight_ptr, bits_ptr, n, start, N, K, BK, ALIGNED, FLIP)
        inside = (k < K)[:, None] & (at < end)[None, :]
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=inside, other=0.0)
        sums = tl.dot(w, x, sums, input_precision=PRECISION)
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + sample)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + split.to(tl.int64) * B * N + row[None, :] * N + n[:, None]
    tl.store(out, sums, mask=(n < N)[:, None] & (at < end)[None, :])


@triton.jit
def _grad_input(
    grad_ptr, weight_ptr, bits_ptr, scale_ptr, dx_ptr, x_ptr, inner_ptr, table_ptr, order_ptr,
    count, per, B, N, K, size, part,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr, ALIGNED: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t, tile = tiles.turn(count)
    left = tile * BK
    k = left + tl.arange(0, BK)
    sample, first, end = tiles.place(t, table_ptr, per, ROWS)
    bits_ptr += sample * size
    at = first + tl.arange(0, ROWS)
    row = tiles.row(order_ptr, at, end)
    split = tl.program_id(1)
    if TURNED:
        sums = tl.zeros((BK, ROWS), tl.float32)
    else:
        sums = tl.zeros((ROWS, BK), tl.float32)
    stop = tl.where(first < end, tl.minimum(N, (split + 1) * part), 0)
    for start in range(split * part, stop, BN):
        n = start + tl.arange(0, BN)
        if WIDE:
            n = n.to(tl.int64)
        w = tiles.weight(weight_ptr, bits_ptr, n, left, N, K, BK, ALIGNED, FLIP)
        inside = (at < end)[:, None] & (n < N)[None, :]
        g = tl.load(grad_ptr + row[:, None] * N + n[None, :], mask=inside, other=0.0)
        if TURNED:
            sums = tl.dot(tl.trans(w), tl.trans(g), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(g, w, sums, input_precision=PRECISION)
    if TURNED:
        sums = tl.trans(sums)
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + sample)
    inside = (at < end)[:, None] & (k < K)[None, :]
    places = row[:, None] * K + k[None, :]
    tl.store(dx_ptr + split.to(tl.int64) * B * K + places, sums, mask=inside)
    if inner_ptr is not None:
        # sum(dx * x) of the rows of a mask is sum(dL/dW' * W').
        x = tl.load(x_ptr + places, mask=inside, other=0.0)
        across = tl.num_programs(0) // count * tl.num_programs(1)
        own = t.to(tl.int64) * across + tile * tl.num_programs(1) + split
        tl.store(inner_ptr + own, tl.sum(sums * x.to(tl.float32)))


@triton.jit
def _grad_weight(
    grad_ptr, x_ptr, bits_ptr, scale_ptr, dw_ptr, ends_ptr, order_ptr,
    per, N, K, size, samples,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tiles.columns(BN, WIDE)
    left = tl.program_id(1) * BK
    k = left + tl.arange(0, BK)
    split = tl.program_id(2)
    total = tl.zeros((BN, BK), tl.float32)
    end = tl.program_id(0).to(tl.int64) * 0
    for sample in range(samples):
        first = end
        if ends_ptr is None:
            end += per
        else:
            end = tl.load(ends_ptr + sample)
        part = tl.cdiv(tl.cdiv(end - first, tl.num_programs(2)), ROWS) * ROWS
        start = first + split * part
        stop = tl.minimum(end, start + part)
        sums = tiles.products(grad_ptr, x_ptr, order_ptr, start, stop, n, k, N, K, ROWS, PRECISION)
        if scale_ptr is not None:
            sums *= tl.load(scale_ptr + sample)
        total += tiles.select(tiles.active(bits_ptr, n, left, N, K, BK, ALIGNED), sums, FLIP)
        bits_ptr += size
    out = dw_ptr + split.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(out, total, mask=(n < N)[:, None] & (k < K)[None, :])


def _planned(rows: Tensor, N: int, K: int, samples: int, groups: Tensor | None) -> Plan:
    """The way these rows take; those that name their masks lie in no blocks that torch could multiply."""
    tf32 = tiles.precision(rows.dtype) == "tf32"
    found = plan(len(rows), N, K, samples, rows.dtype, launch.capability(rows), tf32)
    return Plan("tiles") if groups is not None and found.path == "scratch" else found


def masked_linear(
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    flip: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias.

    For learned_linear inactive weights may be negated and each mask's product scaled by a float32 (S,).
    """
    (B, K), N, samples = x.shape, weight.shape[0], len(active)
    x, weight, active = x.contiguous(), weight.contiguous(), active.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = _planned(x, N, K, samples, groups)
    if chosen.path == "scratch":
        return scratch.forward(x, weight, active, bias, chosen.block, flip, scale)
    size = active.shape[1]
    switches = {
        "ALIGNED": K % 8 == 0,
        "FLIP": flip,
        "WIDE": launch.wide(weight.numel()),
        "enable_fp_fusion": True,
    }
    per = triton.cdiv(B, samples)
    if chosen.path == "few":
        rows, few_n, few_k = triton.next_power_of_2(per), 8, 256
        cut = tiles.cut(groups, samples, B, rows)
        with launch.on(x):
            _few[(triton.cdiv(N, few_n) * cut.number,)](
                x, weight, active, scale, bias, y, cut.table, cut.order,
                cut.number, cut.per, N, K, size,
                ROWS=rows, BN=few_n, BK=few_k, **switches,
            )  # fmt: skip
        return y

    def multiply(shape: tune.Shape) -> Tensor:
        rows, block_n, block_k, warps, stages = shape
        cut = tiles.cut(groups, samples, B, rows)
        split = tiles.splits(triton.cdiv(N, block_n) * cut.number, triton.cdiv(K, block_k))
        part = triton.cdiv(triton.cdiv(K, block_k), split) * block_k
        sums = y if split == 1 else torch.empty((split, B, N), dtype=torch.float32, device=x.device)
        with launch.on(x):
            _forward[(triton.cdiv(N, block_n) * cut.number, split)](
                x, weight, active, scale, bias if split == 1 else None, sums, cut.table, cut.order,
                cut.number, cut.per, B, N, K, size, part,
                ROWS=rows, BN=block_n, BK=block_k, PRECISION=tiles.precision(x.dtype),
                num_warps=warps, num_stages=stages, **switches,
            )  # fmt: skip
            if split > 1:
                tiles.add(sums, bias, y)
        return y

    key = (N, K, samples, tune.bucket(B), groups is None, tiles.precision(x.dtype))
    shapes = tiles.candidates(per, x.dtype, K)
    return multiply(tune.best("masked_linear", key, shapes, multiply, x))


def grad_input(
    grad: Tensor,
    weight: Tensor,
    active: Tensor,
    groups: Tensor | None,
    flip: bool = False,
    scale: Tensor | None = None,
    x: Tensor | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """dL/dx = dY where(active, W, 0); into `inner` (S,), where given, goes sum(dL/dx * x) of each mask."""
    (B, N), K, samples = grad.shape, weight.shape[1], len(active)
    grad, weight, active = grad.contiguous(), weight.contiguous(), active.contiguous()
    dx = torch.empty((B, K), dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        if inner is not None:
            inner.zero_()
        return dx
    chosen = _planned(grad, N, K, samples, groups)
    if chosen.path == "scratch" and inner is None:
        return scratch.grad_input(grad, weight, active, chosen.block, flip, scale)
    if x is not None:
        x = x.contiguous()

    def multiply(shape: tune.Shape) -> Tensor:
        rows, block_k, block_n, warps, stages = shape
        cut, across = tiles.cut(groups, samples, B, rows), triton.cdiv(K, block_k)
        split = tiles.splits(across * cut.number, triton.cdiv(N, block_n))
        part = triton.cdiv(triton.cdiv(N, block_n), split) * block_n
        sums = (
            dx if split == 1 else torch.empty((split, B, K), dtype=torch.float32, device=dx.device)
        )
        parts = None if inner is None else inner.new_empty(cut.number, across * split)
        with launch.on(grad):
            _grad_input[(across * cut.number, split)](
                grad, weight, active, scale, sums, x if inner is not None else None, parts,
                cut.table, cut.order, cut.number, cut.per, B, N, K, active.shape[1], part,
                ROWS=rows, BN=block_n, BK=block_k, PRECISION=tiles.precision(grad.dtype),
                # On sm_90 the left operand has 64 rows or the older instructions multiply.
                TURNED=rows < 64 and grad.dtype != torch.float32,
                ALIGNED=K % 8 == 0, FLIP=flip, WIDE=launch.wide(weight.numel()),
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
            if split > 1:
                tiles.add(sums, None, dx)
        if inner is not None and parts is not None:
            inner.copy_(tiles.by_mask(parts.sum(dim=1), cut, samples))
        return dx

    key = (N, K, samples, tune.bucket(B), groups is None, tiles.precision(grad.dtype))
    shapes = tiles.candidates(triton.cdiv(B, samples), grad.dtype, K)
    return multiply(tune.best("masked_linear_grad_input", key, shapes, multiply, grad))


def grad_weight(
    grad: Tensor,
    x: Tensor,
    active: Tensor,
    groups: Tensor | None,
    flip: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dY_s^T X_s, 0)."""
    (B, N), K, samples = grad.shape, x.shape[1], len(active)
    grad, x, active = grad.contiguous(), x.contiguous(), active.contiguous()
    dw = torch.empty((N, K), dtype=grad.dtype, device=grad.device)
    if dw.numel() == 0:
        return dw
    tf32 = tiles.precision(grad.dtype) == "tf32"
    if samples == 1 and dense_first(B, N, K, grad.dtype, launch.capability(grad), tf32):
        return scratch.grad_weight(grad, x, active, flip, scale)
    # Pipelined, float32 spills a few registers in Triton 3.6 or in 3.9, by the number of stages; so it does
    # with 4 warps where there are several masks.
    single = grad.dtype == torch.float32
    rows, stages, warps = (
        16 if single else 32,
        1 if single else 3,
        8 if single and samples > 1 else 4,
    )
    block = 64
    cut = tiles.cut(groups, samples, B, rows)
    across = triton.cdiv(N, block), triton.cdiv(K, block)
    # A head of few classes has few tiles and many rows.
    split = tiles.splits(across[0] * across[1], triton.cdiv(B // samples, rows), most=64)
    sums = dw if split == 1 else torch.empty((split, N, K), dtype=torch.float32, device=dw.device)
    with launch.on(grad):
        _grad_weight[(*across, split)](
            grad, x, active, scale, sums, cut.ends, cut.order, cut.per, N, K, active.shape[1], samples,
            ROWS=rows, BN=block, BK=block, PRECISION=tiles.precision(grad.dtype),
            ALIGNED=K % 8 == 0, FLIP=flip, WIDE=launch.wide(dw.numel()),
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split > 1:
            tiles.add(sums, None, dw)
    return dw
