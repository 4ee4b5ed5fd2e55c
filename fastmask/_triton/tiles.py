"""Tiles of a linear layer's weight, of its bits, and of the rows of x that belong to one mask.

What the kernels of masked_linear and learned_linear share, and how their launchers cut rows and K.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed

# Programs that keep a large device busy; part of no result but for where K is split.
BUSY = 256


@triton.jit
def active(bits_ptr, n, start, N, K, BK: tl.constexpr, ALIGNED: tl.constexpr):
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
def weight(
    weight_ptr, bits_ptr, n, start, N, K,
    BK: tl.constexpr, ALIGNED: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Tile (BN, BK) of W with masked-out entries 0, or flipped: selected, never multiplied."""
    k = start + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=inside, other=0.0)
    return select(active(bits_ptr, n, start, N, K, BK, ALIGNED), w, FLIP)


@triton.jit
def select(ones, values, FLIP: tl.constexpr):
    """The values where there is a one; elsewhere 0 or, to flip, their negatives."""
    if FLIP:
        chosen = tl.where(ones, values, -values)
    else:
        chosen = tl.where(ones, values, 0.0)
    return chosen


@triton.jit
def products(
    grad_ptr, x_ptr, order_ptr, first, end, n, k, N, K,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile (BN, BK) of dY^T X over the rows of one mask, in float32."""
    sums = tl.zeros((n.shape[0], k.shape[0]), tl.float32)
    for start in range(first, end, ROWS):
        at = start + tl.arange(0, ROWS)
        r = row(order_ptr, at, end)
        inside = (n < N)[:, None] & (at < end)[None, :]
        g = tl.load(grad_ptr + r[None, :] * N + n[:, None], mask=inside, other=0.0)
        inside = (at < end)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + r[:, None] * K + k[None, :], mask=inside, other=0.0)
        if g.dtype == tl.float32:
            # Rows may be many: each tile's sum is rounded by itself, so that errors grow with the number of
            # tiles. (Without a limit to the terms of a sum the compiler would go on in one.)
            sums += tl.dot(g, x, input_precision=PRECISION, max_num_imprecise_acc=ROWS)
        else:
            sums = tl.dot(g, x, sums, input_precision=PRECISION)
    return sums


@triton.jit
def turn(count):
    """This program's tile of rows, of `count`, and of W: those that share a tile of W run side by side."""
    program = tl.program_id(0)
    return program % count, program // count


@triton.jit
def place(t, table_ptr, per, ROWS: tl.constexpr):
    """Mask, first place and end of a tile of rows: equal groups, or a line of the table."""
    t = t.to(tl.int64)
    if table_ptr is None:
        count = tl.cdiv(per, ROWS)
        sample = t // count
        first = sample * per + (t % count) * ROWS
        end = (sample + 1) * per
    else:
        sample = tl.load(table_ptr + 3 * t)
        first = tl.load(table_ptr + 3 * t + 1)
        end = tl.load(table_ptr + 3 * t + 2)
    return sample, first, end


@triton.jit
def row(order_ptr, at, end):
    """Rows of x at these places: the places themselves where masks have equal groups."""
    found = at
    if order_ptr is not None:
        found = tl.load(order_ptr + at, mask=at < end, other=0)
    return found


@triton.jit
def span(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Indices of a block, in 64 bits where WIDE."""
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def columns(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    return span(tl.program_id(0), BLOCK, WIDE)


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


def add(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y (B, N) is the sum of the parts (P, B, N), added in order, and the bias."""
    _add[(triton.cdiv(y.numel(), 1024),)](
        parts, bias, y, y.numel(), y.shape[1],
        SPLIT=len(parts), BLOCK=1024, enable_fp_fusion=True,
    )  # fmt: skip


def splits(tiles: int, steps: int, most: int = 8) -> int:
    """Parts of a sum: a power of two up to `most` that keeps a device busy, each of 4 steps or more."""
    split = 1
    while split < most and tiles * split < BUSY and steps >= 8 * split:
        split *= 2
    return split


@dataclass(frozen=True)
class Rows:
    """Tiles of rows, each of one mask: how many, and for `groups` a line (mask, first, end) each."""

    number: int
    per: int
    table: Tensor | None = None
    order: Tensor | None = None
    ends: Tensor | None = None


def cut(groups: Tensor | None, samples: int, count: int, rows: int) -> Rows:
    """Cut `count` rows into tiles; nothing is read back, so that for `groups` some tiles may be empty."""
    if groups is None:
        per = count // samples
        return Rows(samples * triton.cdiv(per, rows), per)
    counts = torch.zeros(samples, dtype=torch.int64, device=groups.device)
    counts.scatter_add_(0, groups, torch.ones_like(groups))
    ends, tiles = counts.cumsum(0), (counts + rows - 1) // rows
    number = count // rows + samples
    t = torch.arange(number, device=groups.device)
    line = torch.searchsorted(tiles.cumsum(0), t, right=True)
    sample = line.clamp(max=samples - 1)
    first = (ends - counts)[sample] + (t - (tiles.cumsum(0) - tiles)[sample]) * rows
    table = torch.stack((sample, first, ends[sample] * (line < samples)), dim=1)
    return Rows(number, 0, table, torch.argsort(groups, stable=True), ends)


def by_mask(sums: Tensor, rows: Rows, samples: int) -> Tensor:
    """Sums of tiles of rows added up for each mask, in an order that is always the same."""
    if rows.table is None:
        return sums.view(samples, -1).sum(dim=1)
    own = rows.table[:, 0] == torch.arange(samples, device=sums.device).unsqueeze(1)
    return torch.where(own, sums, 0.0).sum(dim=1)


def precision(dtype: torch.dtype) -> str:
    """TF32 only where torch allows it."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def blocks(per: int, dtype: torch.dtype, K: int) -> tuple[int, int, int, int]:
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


def candidates(per: int, dtype: torch.dtype, K: int) -> list[tuple[int, ...]]:
    """Rows, outputs, terms, warps and stages of a tile: those of `blocks`, then a few others to measure."""
    rows, outs, terms, warps = blocks(per, dtype, K)
    others = itertools.product((rows,), (outs, outs // 2), (terms, terms // 2), (4, 8), (3, 4))
    found: list[tuple[int, ...]] = [(rows, outs, terms, warps, 3)]
    # Products of fewer than 16 terms or outputs are none of the tensor cores'.
    found += [shape for shape in others if shape != found[0] and min(shape[1:3]) >= 16]
    return found[:12]
