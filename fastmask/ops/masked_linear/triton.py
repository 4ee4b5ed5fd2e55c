"""Triton's masked_linear: W is read through its bits, each mask's rows of x in tiles of their own.

    few rows a mask    y[b, n] = sum_k Wm[n, k] x[b, k] on CUDA cores: W is read once for up to 4 rows
    forward            y^T = Wm x^T: as the left operand a masked tile goes from registers to the tensor cores
    grad input         dx = dy Wm: here Wm is the right operand, which they read from shared memory
    grad weight        dW = sum over masks of where(active, dy^T x, 0)

Where the tiles of a forward are too few for the device, K is split into parts that depend on shapes
alone, and their sums are added in order: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows a mask up to which no tensor core is used.
FEW = 4
# Programs that keep a large device busy; part of no result but for where K is split.
BUSY = 256


@triton.jit
def _active(bits_ptr, n, start, N, K, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """Bits (BN, BK) of one mask: a byte for eight columns where each row of W starts on one."""
    if ALIGNED:
        byte = start // 8 + tl.arange(0, BK // 8)
        inside = (n < N)[:, None] & (byte * 8 < K)[None, :]
        found = tl.load(bits_ptr + n[:, None] * (K // 8) + byte[None, :], mask=inside, other=0)
        ones = tl.reshape(packed.expand(found), (n.shape[0], BK))
    else:
        k = start + tl.arange(0, BK)
        inside = (n < N)[:, None] & (k < K)[None, :]
        ones = packed.gather(bits_ptr, n[:, None] * K + k[None, :], inside)
    return ones


@triton.jit
def _weight(weight_ptr, bits_ptr, n, start, N, K, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """Tile (BN, BK) of W with masked-out entries 0: selected, never multiplied."""
    k = start + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=inside, other=0.0)
    return tl.where(_active(bits_ptr, n, start, N, K, BK, ALIGNED), w, 0.0)


@triton.jit
def _tile(table_ptr, per, ROWS: tl.constexpr):
    """Mask, first place and end of this program's rows: equal groups, or a line of the table."""
    t = tl.program_id(1).to(tl.int64)
    if table_ptr is None:
        tiles = tl.cdiv(per, ROWS)
        sample = t // tiles
        first = sample * per + (t % tiles) * ROWS
        end = (sample + 1) * per
    else:
        sample = tl.load(table_ptr + 3 * t)
        first = tl.load(table_ptr + 3 * t + 1)
        end = tl.load(table_ptr + 3 * t + 2)
    return sample, first, end


@triton.jit
def _row(order_ptr, at, end):
    """Rows of x at these places: the places themselves where masks have equal groups."""
    row = at
    if order_ptr is not None:
        row = tl.load(order_ptr + at, mask=at < end, other=0)
    return row


@triton.jit
def _columns(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    return packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)


@triton.jit
def _few(
    x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, table_ptr, order_ptr,
    per, N, K, size,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = _columns(BN, WIDE)
    sample, first, end = _tile(table_ptr, per, ROWS)
    bits_ptr += sample * size
    row0 = _row(order_ptr, first, end)
    row1 = _row(order_ptr, first + 1, end)
    row2 = _row(order_ptr, first + 2, end)
    row3 = _row(order_ptr, first + 3, end)
    sum0 = tl.zeros((BN, BK), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    # Tiles without rows have nothing to read.
    for start in range(0, tl.where(first < end, K, 0), BK):
        k = start + tl.arange(0, BK)
        w = _weight(weight_ptr, bits_ptr, n, start, N, K, BK, ALIGNED).to(tl.float32)
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
    y = tl.sum(sum0, axis=1) + bias
    tl.store(y_ptr + row0 * N + n, y, mask=n < tl.where(first < end, N, 0))
    if ROWS > 1:
        y = tl.sum(sum1, axis=1) + bias
        tl.store(y_ptr + row1 * N + n, y, mask=n < tl.where(first + 1 < end, N, 0))
    if ROWS > 2:
        y = tl.sum(sum2, axis=1) + bias
        tl.store(y_ptr + row2 * N + n, y, mask=n < tl.where(first + 2 < end, N, 0))
        y = tl.sum(sum3, axis=1) + bias
        tl.store(y_ptr + row3 * N + n, y, mask=n < tl.where(first + 3 < end, N, 0))


@triton.jit
def _forward(
    x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, table_ptr, order_ptr,
    per, B, N, K, size, part,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = _columns(BN, WIDE)
    sample, first, end = _tile(table_ptr, per, ROWS)
    bits_ptr += sample * size
    at = first + tl.arange(0, ROWS)
    row = _row(order_ptr, at, end)
    split = tl.program_id(2)
    sums = tl.zeros((BN, ROWS), tl.float32)
    stop = tl.where(first < end, tl.minimum(K, (split + 1) * part), 0)
    for start in range(split * part, stop, BK):
        k = start + tl.arange(0, BK)
        w = _weight(weight_ptr, bits_ptr, n, start, N, K, BK, ALIGNED)
        inside = (k < K)[:, None] & (at < end)[None, :]
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=inside, other=0.0)
        sums = tl.dot(w, x, sums, input_precision=PRECISION)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + split.to(tl.int64) * B * N + row[None, :] * N + n[:, None]
    tl.store(out, sums, mask=(n < N)[:, None] & (at < end)[None, :])


@triton.jit
def _add(parts_ptr, bias_ptr, y_ptr, count, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = packed.start(BLOCK, True) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLIT):
        total += tl.load(parts_ptr + at, mask=at < count, other=0.0)
        parts_ptr += count
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total, mask=at < count)


@triton.jit
def _grad_input(
    grad_ptr, weight_ptr, bits_ptr, dx_ptr, table_ptr, order_ptr,
    per, N, K, size,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    left = tl.program_id(0) * BK
    k = left + tl.arange(0, BK)
    sample, first, end = _tile(table_ptr, per, ROWS)
    bits_ptr += sample * size
    at = first + tl.arange(0, ROWS)
    row = _row(order_ptr, at, end)
    sums = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, tl.where(first < end, N, 0), BN):
        n = start + tl.arange(0, BN)
        if WIDE:
            n = n.to(tl.int64)
        w = _weight(weight_ptr, bits_ptr, n, left, N, K, BK, ALIGNED)
        inside = (at < end)[:, None] & (n < N)[None, :]
        g = tl.load(grad_ptr + row[:, None] * N + n[None, :], mask=inside, other=0.0)
        sums = tl.dot(g, w, sums, input_precision=PRECISION)
    out = dx_ptr + row[:, None] * K + k[None, :]
    tl.store(out, sums, mask=(at < end)[:, None] & (k < K)[None, :])


@triton.jit
def _grad_weight(
    grad_ptr, x_ptr, bits_ptr, dw_ptr, ends_ptr, order_ptr,
    per, N, K, size, samples,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = _columns(BN, WIDE)
    left = tl.program_id(1) * BK
    k = left + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    end = tl.program_id(0).to(tl.int64) * 0
    for sample in range(samples):
        first = end
        if ends_ptr is None:
            end += per
        else:
            end = tl.load(ends_ptr + sample)
        sums = tl.zeros((BN, BK), tl.float32)
        for start in range(first, end, ROWS):
            at = start + tl.arange(0, ROWS)
            row = _row(order_ptr, at, end)
            inside = (n < N)[:, None] & (at < end)[None, :]
            g = tl.load(grad_ptr + row[None, :] * N + n[:, None], mask=inside, other=0.0)
            inside = (at < end)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=inside, other=0.0)
            sums = tl.dot(g, x, sums, input_precision=PRECISION)
        total += tl.where(_active(bits_ptr, n, left, N, K, BK, ALIGNED), sums, 0.0)
        bits_ptr += size
    tl.store(dw_ptr + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@dataclass(frozen=True)
class _Tiles:
    """Tiles of rows, each of one mask: how many, and for `groups` a line (mask, first, end) each."""

    number: int
    per: int
    table: Tensor | None = None
    order: Tensor | None = None
    ends: Tensor | None = None


def _tiles(groups: Tensor | None, samples: int, count: int, rows: int) -> _Tiles:
    """Cut `count` rows into tiles; nothing is read back, so that for `groups` some tiles may be empty."""
    if groups is None:
        per = count // samples
        return _Tiles(samples * triton.cdiv(per, rows), per)
    counts = torch.zeros(samples, dtype=torch.int64, device=groups.device)
    counts.scatter_add_(0, groups, torch.ones_like(groups))
    ends, tiles = counts.cumsum(0), (counts + rows - 1) // rows
    number = count // rows + samples
    t = torch.arange(number, device=groups.device)
    line = torch.searchsorted(tiles.cumsum(0), t, right=True)
    sample = line.clamp(max=samples - 1)
    first = (ends - counts)[sample] + (t - (tiles.cumsum(0) - tiles)[sample]) * rows
    table = torch.stack((sample, first, ends[sample] * (line < samples)), dim=1)
    return _Tiles(number, 0, table, torch.argsort(groups, stable=True), ends)


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch allows it."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _blocks(per: int, dtype: torch.dtype, K: int) -> tuple[int, int, int, int]:
    """Rows of x, outputs and terms of a tile, and its warps.

    Tiles are smaller in float32, and where bits do not start on a byte: gathered, they take registers.
    With 4 warps a few of those spill there in Triton 3.6.
    """
    small = dtype == torch.float32 or K % 8 != 0
    most = 64 if small else 128
    rows = min(most, max(16, triton.next_power_of_2(per)))
    terms = 16 if dtype == torch.float32 else most // 2
    warps = 8 if K % 8 != 0 or (dtype != torch.float32 and rows == most) else 4
    return rows, most, terms, warps


def masked_linear(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias."""
    (B, K), N, samples = x.shape, weight.shape[0], len(active)
    x, weight, active = x.contiguous(), weight.contiguous(), active.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    size = active.shape[1]
    switches = {
        "ALIGNED": K % 8 == 0,
        "WIDE": launch.wide(weight.numel()),
        "enable_fp_fusion": True,
    }
    per = triton.cdiv(B, samples)
    if per <= FEW:
        rows, few_n, few_k = triton.next_power_of_2(per), 8, 256
        cut = _tiles(groups, samples, B, rows)
        with launch.on(x):
            _few[(triton.cdiv(N, few_n), cut.number)](
                x, weight, active, bias, y, cut.table, cut.order, cut.per, N, K, size,
                ROWS=rows, BN=few_n, BK=few_k, **switches,
            )  # fmt: skip
        return y
    rows, block_n, block_k, warps = _blocks(per, x.dtype, K)
    cut = _tiles(groups, samples, B, rows)
    split = _splits(triton.cdiv(N, block_n) * cut.number, triton.cdiv(K, block_k))
    part = triton.cdiv(triton.cdiv(K, block_k), split) * block_k
    sums = y if split == 1 else torch.empty((split, B, N), dtype=torch.float32, device=x.device)
    with launch.on(x):
        _forward[(triton.cdiv(N, block_n), cut.number, split)](
            x, weight, active, bias if split == 1 else None, sums, cut.table, cut.order,
            cut.per, B, N, K, size, part,
            ROWS=rows, BN=block_n, BK=block_k, PRECISION=_precision(x.dtype),
            num_warps=warps, num_stages=3, **switches,
        )  # fmt: skip
        if split > 1:
            _add[(triton.cdiv(y.numel(), 1024),)](
                sums, bias, y, y.numel(), N, SPLIT=split, BLOCK=1024, enable_fp_fusion=True
            )
    return y


def _splits(tiles: int, steps: int) -> int:
    """Parts of K: a power of two up to 8 that keeps a device busy, each of 4 steps or more."""
    split = 1
    while split < 8 and tiles * split < BUSY and steps >= 8 * split:
        split *= 2
    return split


def grad_input(grad: Tensor, weight: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dx = dY where(active, W, 0)."""
    (B, N), K, samples = grad.shape, weight.shape[1], len(active)
    grad, weight, active = grad.contiguous(), weight.contiguous(), active.contiguous()
    dx = torch.empty((B, K), dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    rows, block_k, block_n, warps = _blocks(triton.cdiv(B, samples), grad.dtype, K)
    cut = _tiles(groups, samples, B, rows)
    with launch.on(grad):
        _grad_input[(triton.cdiv(K, block_k), cut.number)](
            grad, weight, active, dx, cut.table, cut.order, cut.per, N, K, active.shape[1],
            ROWS=rows, BN=block_n, BK=block_k, PRECISION=_precision(grad.dtype),
            ALIGNED=K % 8 == 0, WIDE=launch.wide(weight.numel()),
            num_warps=warps, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return dx


def grad_weight(grad: Tensor, x: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dY_s^T X_s, 0)."""
    (B, N), K, samples = grad.shape, x.shape[1], len(active)
    grad, x, active = grad.contiguous(), x.contiguous(), active.contiguous()
    dw = torch.empty((N, K), dtype=grad.dtype, device=grad.device)
    if dw.numel() == 0:
        return dw
    # Pipelined, float32 spills a few registers in Triton 3.6 or in 3.9, by the number of stages.
    rows, stages = (16, 1) if grad.dtype == torch.float32 else (32, 3)
    block = 64
    cut = _tiles(groups, samples, B, rows)
    with launch.on(grad):
        _grad_weight[(triton.cdiv(N, block), triton.cdiv(K, block))](
            grad, x, active, dw, cut.ends, cut.order, cut.per, N, K, active.shape[1], samples,
            ROWS=rows, BN=block, BK=block, PRECISION=_precision(grad.dtype),
            ALIGNED=K % 8 == 0, WIDE=launch.wide(dw.numel()),
            num_warps=4, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return dw
