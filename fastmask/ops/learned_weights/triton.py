"""Triton's learned_weights: one launch draws and selects all weights, one teaches all scores.

    W'        b drawn or compared, where(b, W, off), and the bits stored
    gradients dL/dW and dL/dscores in one pass over dL/dW', the noise drawn again

Elements are taken in logical order, in which Philox numbers them: four share a call in every memory format.
Top-k bits come from topk_mask; scores of other dtypes go weight by weight, and so does what a graph captures
before the addresses are on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch, philox, tables, tiles
from fastmask._triton.weights import layout, like, logical, rounded
from fastmask.ops._layout import packed_bytes
from fastmask.ops.learned_linear.triton import draw
from fastmask.ops.learned_weight import triton as single
from fastmask.ops.learned_weights.reference import one_by_one, one_by_one_grad
from fastmask.ops.masked_weights import triton as selecting

DTYPES = single.DTYPES
BYTES = 128
# A row of the table: addresses of the weight, the scores, the gradient and the bits (0 in the forward), where
# outputs start, elements, area and depth by which an element's place in channels_last memory is found (1 and
# 1 elsewhere), of the weight and of the scores, and the first program.
ROW = 11


@triton.jit
def _place(element, area, depth, LAST: tl.constexpr):
    """Where an element lies in memory."""
    found = element
    if LAST:
        found = logical(element, depth, area)
    return found


@triton.jit
def _load(ptr, place, inside, behind, whole):
    """Values at these places; a whole block, for which none is asked whether it is there, in wide loads."""
    if whole:
        found = tl.load(ptr + place)
    else:
        found = tl.load(ptr + place, mask=inside, other=behind)
    return found


@triton.jit
def _store(ptr, place, values, inside, whole):
    if whole:
        tl.store(ptr + place, values)
    else:
        tl.store(ptr + place, values, mask=inside)


@triton.jit
def _address(at, like_ptr, ALIGNED: tl.constexpr):
    """The address that lies there, of elements like another's."""
    found = tl.load(at).to(like_ptr.dtype)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _sizes(row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """First byte of this program's block, and elements and memory formats of its layer."""
    first = (tl.program_id(0) - tl.load(row + COLUMNS - 1)) * BLOCK
    n, area, depth = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    own_area, own_depth = tl.load(row + 8), tl.load(row + 9)
    if not WIDE:
        first, n = first.to(tl.int32), n.to(tl.int32)
        area, depth = area.to(tl.int32), depth.to(tl.int32)
        own_area, own_depth = own_area.to(tl.int32), own_depth.to(tl.int32)
    return tl.multiple_of(first, BLOCK), n, area, depth, own_area, own_depth


@triton.jit
def _draw_all(
    table_ptr, weight_ptr, scores_ptr, seeds_ptr, bits_ptr, out_ptr, mu, layers,
    LAYERS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, LAST: tl.constexpr,
    FLIP: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, layer = tables.row(table_ptr, layers, LAYERS, COLUMNS)
    first, n, area, depth, own_area, own_depth = _sizes(row, COLUMNS, BLOCK, WIDE)
    start = tl.multiple_of(tl.load(row + 4), 64)
    whole = (first + BLOCK) * 8 <= n
    at = first + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Behind the end scores are -inf and bits 0.
    place = _place(element, own_area, own_depth, LAST)
    scores_ptr = _address(row + 1, scores_ptr, ALIGNED)
    scores = _load(scores_ptr, place, element < n, float("-inf"), whole).to(tl.float32)
    place = _place(element, area, depth, LAST)
    w = _load(_address(row, weight_ptr, ALIGNED), place, element < n, 0.0, whole)
    if seeds_ptr is None:
        ones = scores > mu
    else:
        quad = first * 2 + tl.arange(0, 2 * BLOCK)
        k24 = philox.uniform24(tl.load(seeds_ptr + layer), quad, 0, 0, WIDE)
        ones = philox.drawn(scores, tl.reshape(k24, (BLOCK, 8)), NEAR)
    # Bits fill words of 64 elements.
    _store(bits_ptr + start // 8, at, packed.collect(ones), at < (n + 63) // 64 * 8, whole)
    out_ptr += start
    _store(out_ptr, place, rounded(ones, w, out_ptr, FLIP), element < n, whole)


@triton.jit
def _teach_all(
    table_ptr, grad_ptr, weight_ptr, scores_ptr, seeds_ptr, dw_ptr, ds_ptr, rate, layers,
    LAYERS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, LAST: tl.constexpr,
    FLIP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, layer = tables.row(table_ptr, layers, LAYERS, COLUMNS)
    first, n, area, depth, own_area, own_depth = _sizes(row, COLUMNS, BLOCK, WIDE)
    start = tl.multiple_of(tl.load(row + 4), 64)
    whole = (first + BLOCK) * 8 <= n
    at = first + tl.arange(0, BLOCK)
    element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = _place(element, area, depth, LAST)
    grad = _load(_address(row + 2, grad_ptr, ALIGNED), place, element < n, 0.0, whole)
    if dw_ptr is not None:
        bits_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
        ones = packed.expand(_load(bits_ptr, at, at * 8 < n, 0, whole))
        chosen = tiles.select(ones, grad.to(tl.float32), FLIP)
        _store(dw_ptr + start, place, chosen, element < n, whole)
    if ds_ptr is not None:
        w = _load(_address(row, weight_ptr, ALIGNED), place, element < n, 0.0, whole)
        # As the product read it, rounded.
        w = w.to(grad.dtype).to(tl.float32)
        if FLIP:
            w = 2 * w
        taught = grad.to(tl.float32) * w
        place = _place(element, own_area, own_depth, LAST)
        if seeds_ptr is not None:
            scores_ptr = _address(row + 1, scores_ptr, ALIGNED)
            logits = _load(scores_ptr, place, element < n, 0.0, whole).to(tl.float32)
            quad = first * 2 + tl.arange(0, 2 * BLOCK)
            k24 = philox.uniform24(tl.load(seeds_ptr + layer), quad, 0, 0, WIDE)
            taught *= philox.slope(logits, tl.reshape(k24, (BLOCK, 8)), rate, UNIT)
        _store(ds_ptr + start, place, taught, element < n, whole)


@dataclass(frozen=True)
class _Layers:
    """Layers as they are read, where each begins in an output, and what a launch over them takes."""

    weights: list[Tensor]
    scores: list[Tensor]
    grads: list[Tensor]
    starts: list[int]
    places: int
    programs: int
    table: Tensor | None
    constants: dict[str, Any]

    def views(self, made: Tensor, alike: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        """Each layer's part of an output, in the memory that was read, then in the format that was given."""
        found: list[Tensor] = []
        for i, start in enumerate(self.starts):
            if self.grads and self.grads[i].shape != given[i].shape:
                found.append(given[i].new_empty(0))
                continue
            part = made[start:].as_strided(alike[i].shape, alike[i].stride())
            found.append(like(part, given[i]))
        return found


def _layers(
    weights: list[Tensor], scores: list[Tensor], grads: list[Tensor], active: list[Tensor]
) -> _Layers:
    """Layers that take part, in the memory they are read from; what has an empty gradient takes no place."""
    read, own, given = [], [], []
    rows, starts, place, program = [], [], 0, 0
    for i, (weight, score) in enumerate(zip(weights, scores, strict=True)):
        n, (form, depth), (score_form, score_depth) = (
            weight.numel(), layout(weight), layout(score)
        )  # fmt: skip
        read.append(weight.contiguous(memory_format=form))
        own.append(score.contiguous(memory_format=score_form))
        rows += [read[i].data_ptr(), own[i].data_ptr()]
        if grads:
            n = n if grads[i].shape == weight.shape else 0
            given.append(grads[i].contiguous(memory_format=form) if n else grads[i])
            rows += [given[i].data_ptr(), active[i].data_ptr()]
        else:
            rows += [0, 0]
        area = weight.shape[2:].numel() if form == torch.channels_last else 1
        score_area = weight.shape[2:].numel() if score_form == torch.channels_last else 1
        rows += [place, n, area, depth, score_area, score_depth, program]
        starts.append(place)
        # Each output starts on a word of the mask, and so on 128 bytes.
        place += -(-n // 64) * 64
        program += triton.cdiv(n, 8 * BYTES)
    constants = {
        "LAYERS": triton.next_power_of_2(len(weights)),
        "COLUMNS": ROW,
        "ALIGNED": all(t.data_ptr() % 16 == 0 for t in (*read, *own, *given)),
        "LAST": any(area > 1 for area in (*rows[6::ROW], *rows[8::ROW])),
        "BLOCK": BYTES,
        "WIDE": any(launch.wide(n) for n in rows[5::ROW]),
    }
    table = tables.on_device(tuple(rows), read[0].device)
    return _Layers(read, own, given, starts, place, program, table, constants)


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
    if method == "topk":
        bits = [draw(own, None, method, 1, mu, density)[0] for own in scores]
        return selecting.masked_weights(weights, bits, dtype, off == "flip"), bits
    layers = _layers(weights, scores, [], []) if scores[0].dtype in DTYPES else None
    if layers is None or layers.table is None:
        return one_by_one(single, weights, scores, seeds, method, mu, density, off, dtype)
    one = layers.weights[0]
    out = torch.empty(layers.places, dtype=dtype, device=one.device)
    active = torch.empty(layers.places // 8, dtype=torch.uint8, device=one.device)
    if layers.programs > 0:
        with launch.on(one):
            _draw_all[(layers.programs,)](
                layers.table, one, layers.scores[0], _each(seeds), active, out,
                # torch compares in the scores' dtype, to which it rounds mu.
                torch.tensor(mu, dtype=scores[0].dtype, device="cpu").item(), len(weights),
                FLIP=off == "flip", NEAR=philox.NEAR, **layers.constants, enable_fp_fusion=False,
            )  # fmt: skip
    bits = [
        active[start // 8 :][: packed_bytes(weight.numel())]
        for start, weight in zip(layers.starts, weights, strict=True)
    ]
    return layers.views(out, layers.weights, weights), bits


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
    bits = [one.contiguous() for one in active]
    layers = _layers(weights, scores, grads, bits) if scores[0].dtype in DTYPES else None
    if layers is None or layers.table is None:
        return one_by_one_grad(
            single, grads, weights, scores, active, seeds, method, tau, off, output_mask
        )
    (of_weights, of_scores), one, own = output_mask, layers.weights[0], layers.scores[0]
    dw = one.new_empty(layers.places) if of_weights else None
    dscores = own.new_empty(layers.places) if of_scores else None
    if layers.programs > 0:
        with launch.on(one):
            _teach_all[(layers.programs,)](
                layers.table, layers.grads[0], one, own, _each(seeds), dw, dscores,
                1.0 / tau, len(weights),
                FLIP=off == "flip", UNIT=tau == 1.0, **layers.constants, enable_fp_fusion=True,
            )  # fmt: skip
    return (
        layers.views(dw, layers.weights, weights) if dw is not None else _none_of(weights),
        layers.views(dscores, layers.scores, scores) if dscores is not None else _none_of(scores),
    )


def _none_of(tensors: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(0) for t in tensors]


def _each(seeds: Tensor | None) -> Tensor | None:
    return None if seeds is None else seeds.contiguous()
