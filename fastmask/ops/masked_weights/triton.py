"""Triton's masked_weights: one launch for all, each program finding its layer in a table of addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, tables
from fastmask._triton import weights as each
from fastmask._triton.weights import layout, logical

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 256
# A row of the table: addresses of the weight and of its bits, where its output starts, its elements, the
# area and depth by which a place of channels_last memory is found (1 and 1 elsewhere), its first program.
ROW = 7


@triton.jit
def _block(
    weight_ptr, bits_ptr, out_ptr, at, n, area, depth, FLIP: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Bytes `at` of a layer's bits; a whole block asks no element whether it is there."""
    place = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    if WHOLE:
        w = tl.load(weight_ptr + place)
        if area == 1:
            ones = packed.expand(tl.load(bits_ptr + at))
        else:
            ones = packed.gather(bits_ptr, logical(place, area, depth), place >= 0)
        tl.store(out_ptr + place, each.rounded(ones, w, out_ptr, FLIP))
    else:
        w = tl.load(weight_ptr + place, mask=place < n, other=0.0)
        ones = packed.gather(bits_ptr, logical(place, area, depth), place < n)
        tl.store(out_ptr + place, each.rounded(ones, w, out_ptr, FLIP), mask=place < n)


@triton.jit
def _select_all(
    table_ptr, like_ptr, out_ptr, layers,
    LAYERS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, FLIP: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, _ = tables.row(table_ptr, layers, LAYERS, COLUMNS)
    weight_ptr = tl.load(row).to(like_ptr.dtype)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
    bits_ptr = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    out_ptr += tl.multiple_of(tl.load(row + 2), 64)
    n, area, depth = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    first = (tl.program_id(0) - tl.load(row + 6)) * BLOCK
    if not WIDE:
        n, area, depth, first = (
            n.to(tl.int32),
            area.to(tl.int32),
            depth.to(tl.int32),
            first.to(tl.int32),
        )
    at = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
    if (first + BLOCK) * 8 <= n:
        _block(weight_ptr, bits_ptr, out_ptr, at, n, area, depth, FLIP, True)
    else:
        _block(weight_ptr, bits_ptr, out_ptr, at, n, area, depth, FLIP, False)


def masked_weights(
    weights: list[Tensor], active: list[Tensor], dtype: torch.dtype, flip: bool = False
) -> list[Tensor]:
    """where(active, W, 0) of each weight, in its own memory format, rounded to `dtype`; or flipped."""
    forms = [layout(weight) for weight in weights]
    sources = [
        w.contiguous(memory_format=form) for w, (form, _) in zip(weights, forms, strict=True)
    ]
    bits = [one.contiguous() for one in active]
    rows, place, program = [], 0, 0
    for source, one, (form, depth) in zip(sources, bits, forms, strict=True):
        n = source.numel()
        area = source.shape[2:].numel() if form == torch.channels_last else 1
        rows += [source.data_ptr(), one.data_ptr(), place, n, area, depth, program]
        # Each output starts on a word of the mask, and so on 128 bytes.
        place += -(-n // 64) * 64
        program += triton.cdiv(n, 8 * BYTES)
    like = sources[0]
    table = tables.on_device(tuple(rows), like.device)
    if table is None:
        pairs = zip(weights, active, strict=True)
        return [each.select(w, one.unsqueeze(0), flip)[0].to(dtype) for w, one in pairs]
    out = torch.empty(place, dtype=dtype, device=like.device)
    if program > 0:
        with launch.on(like):
            _select_all[(program,)](
                table, like, out, len(weights),
                LAYERS=triton.next_power_of_2(len(weights)), COLUMNS=ROW,
                ALIGNED=all(source.data_ptr() % 16 == 0 for source in sources),
                FLIP=flip, BLOCK=BYTES, WIDE=any(launch.wide(n) for n in rows[3::ROW]),
                enable_fp_fusion=False,
            )  # fmt: skip
    return [
        each.like(out[start:].as_strided(source.shape, source.stride()), weight)
        for source, start, weight in zip(sources, rows[2::ROW], weights, strict=True)
    ]
