"""Masked weights as tensors, for convolutions and other products that read them whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, philox, tiles

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128


@triton.jit
def logical(place, AREA, depth):
    """Which element of a weight (N, C, R, T) lies at a place of channels_last memory: AREA is RT, depth C."""
    row, rest = place // (AREA * depth), place % (AREA * depth)
    return (row * depth + rest % depth) * AREA + rest // depth


@triton.jit
def rounded(ones, w, out_ptr, FLIP: tl.constexpr):
    """Where there is a one the weight as it is stored, elsewhere 0 or its negative."""
    w = w.to(out_ptr.dtype.element_ty)
    if FLIP:
        # The interpreter negates bfloat16 wrongly.
        w = w.to(tl.float32)
    return tiles.select(ones, w, FLIP)


@triton.jit
def _select(
    weight_ptr, bits_ptr, scale_ptr, out_ptr, n, size, gap, samples, depth,
    AREA: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    place = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = place < n
    w = tl.load(weight_ptr + place, mask=inside, other=0.0)
    if FLIP:
        # The interpreter negates bfloat16 wrongly.
        w = w.to(tl.float32)
    for sample in range(samples):
        if AREA == 1:
            ones = packed.expand(tl.load(bits_ptr + at, mask=at * 8 < n, other=0))
        else:
            ones = packed.gather(bits_ptr, logical(place, AREA, depth), inside)
        chosen = tiles.select(ones, w, FLIP)
        if scale_ptr is not None:
            chosen = chosen.to(tl.float32) * tl.load(scale_ptr + sample)
        tl.store(out_ptr + place, chosen, mask=inside)
        bits_ptr += size
        out_ptr += gap.to(tl.int64)


@triton.jit
def _draw(
    weight_ptr, scores_ptr, seed_ptr, bits_ptr, out_ptr, mu, n, size, samples,
    FLIP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first = packed.start(BLOCK, WIDE)
    at = first + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = element < n
    # Behind the end scores are -inf and bits 0.
    scores = tl.load(scores_ptr + element, mask=inside, other=float("-inf")).to(tl.float32)
    w = tl.load(weight_ptr + element, mask=inside, other=0.0)
    ones = scores > mu
    limit = philox.threshold(scores)
    for sample in range(samples):
        if seed_ptr is not None:
            quad = first * 2 + tl.arange(0, 2 * BLOCK)
            k24 = philox.uniform24(tl.load(seed_ptr), quad, sample, 0, WIDE)
            ones = tl.reshape(k24, (BLOCK, 8)) < limit
        tl.store(bits_ptr + at, packed.collect(ones), mask=at < size)
        tl.store(out_ptr + element, tiles.select(ones, w, FLIP), mask=inside)
        bits_ptr += size
        out_ptr += size.to(tl.int64) * 8


@triton.jit
def _add_selected(
    dense_ptr, bits_ptr, scale_ptr, out_ptr, n, size, samples,
    FLIP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = packed.start(BLOCK, WIDE) + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = element < n
    total = tl.zeros((BLOCK, 8), tl.float32)
    for sample in range(samples):
        ones = packed.expand(tl.load(bits_ptr + at, mask=at * 8 < n, other=0))
        g = tl.load(dense_ptr + element, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            g *= tl.load(scale_ptr + sample)
        total += tiles.select(ones, g, FLIP)
        bits_ptr += size
        dense_ptr += n
    tl.store(out_ptr + element, total, mask=inside)


@triton.jit
def _window(
    weight_ptr, bits_ptr, scale_ptr, out_ptr, top, bottom, left, right, K, across,
    BN: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = top + tiles.span(tile // across, BN, WIDE)
    start = left + tile % across * BK
    k = start + tl.arange(0, BK)
    chosen = tiles.weight(weight_ptr, bits_ptr, n, start, bottom, K, BK, ALIGNED, FLIP)
    if scale_ptr is not None:
        chosen = chosen.to(tl.float32) * tl.load(scale_ptr)
    out = out_ptr + (n - top)[:, None] * (right - left) + (k - left)[None, :]
    tl.store(out, chosen, mask=(n < bottom)[:, None] & (k < right)[None, :])


def select(
    weight: Tensor, active: Tensor, flip: bool = False, scale: Tensor | None = None
) -> list[Tensor]:
    """where(active, W, 0) of each mask (S, bytes), in the memory format of W; flipped, or scaled by (S,)."""
    order, depth = layout(weight)
    source = weight.contiguous(memory_format=order)
    # Each mask's weights start on a word, wherever n ends.
    out = weight.new_empty((len(active), active.shape[1] * 8))
    area = weight.shape[2:].numel() if order == torch.channels_last else 1
    write(source, active, out, flip, scale, area, depth)
    return [like(one.as_strided(source.shape, source.stride()), weight) for one in out]


def write(
    weight: Tensor,
    active: Tensor,
    out: Tensor,
    flip: bool,
    scale: Tensor | None,
    area: int = 1,
    depth: int = 1,
) -> None:
    """Write what `select` gives into the rows of `out` (S, n or more), in the weight's order in memory."""
    n, (samples, size), active = weight.numel(), active.shape, active.contiguous()
    if n > 0:
        with launch.on(weight):
            _select[(triton.cdiv(size, BYTES),)](
                weight, active, scale, out, n, size, out.stride(0), samples, depth,
                AREA=area, FLIP=flip, BLOCK=BYTES, WIDE=launch.wide(size * 8), enable_fp_fusion=False,
            )  # fmt: skip


def drawn_at_once(weight: Tensor, scores: Tensor) -> bool:
    """Whether `draw` takes them: drawing goes in logical order, which the weight has to lie in."""
    return weight.is_contiguous() and scores.dtype in FLOATS and weight.numel() > 0


def draw(
    weight: Tensor, scores: Tensor, seed: Tensor | None, samples: int, mu: float, flip: bool
) -> tuple[list[Tensor], Tensor]:
    """Masked weights as `select` gives them and their bits (S, bytes): sampled, or where scores > mu."""
    n, scores = weight.numel(), scores.contiguous()
    size = -(-n // 64) * 8
    active = torch.empty((samples, size), dtype=torch.uint8, device=weight.device)
    out = torch.empty((samples, size * 8), dtype=weight.dtype, device=weight.device)
    with launch.on(weight):
        _draw[(triton.cdiv(size, BYTES),)](
            weight, scores, seed, active, out,
            # torch compares in the scores' dtype, to which it rounds mu.
            torch.tensor(mu, dtype=scores.dtype, device="cpu").item(), n, size, samples,
            FLIP=flip, BLOCK=BYTES, WIDE=launch.wide(size * 8), enable_fp_fusion=False,
        )  # fmt: skip
    return [like(one.as_strided(weight.shape, weight.stride()), weight) for one in out], active


def like(made: Tensor, weight: Tensor) -> Tensor:
    """A masked weight in the memory format of the weight, which decides that of a convolution."""
    strides = torch.empty_like(weight, device="meta").stride()
    if made.stride() == strides:
        return made
    return made.new_empty_strided(made.shape, strides).copy_(made)


def window(
    weight: Tensor,
    bits: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Tensor,
    flip: bool,
    scale: Tensor | None,
) -> Tensor:
    """Rows and columns, from a multiple of 8, of where(active, W, 0) for one mask, written into `out`."""
    (top, bottom), (left, right), K = rows, columns, weight.shape[1]
    block_n, block_k = 32, 128
    across = triton.cdiv(right - left, block_k)
    _window[(triton.cdiv(bottom - top, block_n) * across,)](
        weight, bits, scale, out, top, bottom, left, right, K, across,
        BN=block_n, BK=block_k, ALIGNED=K % 8 == 0, FLIP=flip,
        WIDE=launch.wide(weight.numel()), enable_fp_fusion=False,
    )  # fmt: skip
    return out[: (bottom - top) * (right - left)].view(bottom - top, right - left)


def add_selected(
    dense: Tensor,
    active: Tensor,
    flip: bool = False,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over masks of where(active_s, G_s, 0), of dense G (S, ...); in float32, rounded to its dtype once.

    `out` may be the dense gradient of the only mask.
    """
    n, (samples, size) = dense[0].numel(), active.shape
    dense, active = dense.contiguous(), active.contiguous()
    if out is None:
        out = torch.empty(dense.shape[1:], dtype=dense.dtype, device=dense.device)
    if n > 0:
        with launch.on(dense):
            _add_selected[(triton.cdiv(size, BYTES),)](
                dense, active, scale, out, n, size, samples,
                FLIP=flip, BLOCK=BYTES, WIDE=launch.wide(size * 8), enable_fp_fusion=True,
            )  # fmt: skip
    return out


def layout(weight: Tensor) -> tuple[torch.memory_format, int]:
    """The memory format that a weight is read in, and its depth C in channels_last."""
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    if last and not weight.is_contiguous():
        return torch.channels_last, weight.shape[1]
    return torch.contiguous_format, 1
