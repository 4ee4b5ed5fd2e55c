"""Triton's topk_mask: the k-th largest score by radix selection, digit by digit, all on the device.

    rank    a score's bits as an unsigned integer that falls as scores rise: 0 is +inf, NaN ranks with -inf
    count   of the ranks whose higher digits are those found, how many have each value of the next digit
    keep    the bits: ranks below the k-th, and of those equal to it the first ones by index

A launch finds the digit of the one before it from that one's counts, so that nothing is read back. Counts
are integers: in whatever order programs add theirs, the sums are the same. Each program owns consecutive
elements; the programs' counts of the last digit, kept apart, say how many equals lie before each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._triton import bits as packed
from fastmask._triton import launch
from fastmask.ops._layout import packed_bytes
from fastmask.ops.topk_mask.reference import kept

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 512
# Programs at most: each reads the counts of all that stand before it.
MOST = 1024
# Up to here launches cost more than counting in wide digits does.
SMALL = 2**22

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def _rank(scores_ptr, element, inside, INFINITY: tl.constexpr):
    score = tl.load(scores_ptr + element, mask=inside, other=0).to(tl.int32)
    # Of 16-bit scores, sign-extended, the lower half; -0.0 has the magnitude of 0.0.
    magnitude = score & (0x7FFFFFFF if INFINITY > 0xFFFF else 0x7FFF)
    below = (score < 0) | (magnitude > INFINITY)
    magnitude = tl.minimum(magnitude, INFINITY).to(tl.uint32)
    return tl.where(below, INFINITY + magnitude, INFINITY - magnitude)


@triton.jit
def _found(row_ptr, BINS: tl.constexpr):
    """The higher digits with the next one, and the place of the k-th among the ranks that have them."""
    prefix, place = tl.load(row_ptr), tl.load(row_ptr + 1)
    counts = tl.load(row_ptr + 2 + tl.arange(0, BINS))
    lower = tl.cumsum(counts, 0) < place
    digit = tl.sum(lower.to(tl.int64), 0)
    return prefix * BINS + digit, place - tl.sum(tl.where(lower, counts, 0), 0)


@triton.jit(do_not_specialize=["shift"])
def _count(
    scores_ptr, before_ptr, row_ptr, parts_ptr, n, k, shift, blocks,
    INFINITY: tl.constexpr, BEFORE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if before_ptr is None:
        prefix = tl.zeros((), tl.int64)
        place = prefix + k
    else:
        prefix, place = _found(before_ptr, BEFORE)
    if program == 0:
        tl.store(row_ptr, prefix)
        tl.store(row_ptr + 1, place)
    digit = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    first = program * blocks
    if WIDE:
        first = first.to(tl.int64)
    for block in range(first, first + blocks):
        element = block * BLOCK + tl.arange(0, BLOCK)
        high = _rank(scores_ptr, element, element < n, INFINITY) >> shift
        alike = (high // BINS == prefix.to(tl.uint32)) & (element < n)
        counts += tl.histogram((high % BINS).to(tl.int32), BINS, mask=alike)
    tl.atomic_add(row_ptr + 2 + digit, counts.to(tl.int64), sem="relaxed")
    if parts_ptr is not None:
        tl.store(parts_ptr + digit * tl.num_programs(0) + program, counts)


@triton.jit
def _keep(
    scores_ptr, row_ptr, parts_ptr, bits_ptr, n, size, blocks,
    INFINITY: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    limit, place = _found(row_ptr, BINS)
    other = tl.arange(0, PROGRAMS)
    row = parts_ptr + limit % BINS * tl.num_programs(0)
    seen = tl.sum(tl.load(row + other, mask=other < program, other=0).to(tl.int64), 0)
    limit = limit.to(tl.uint32)
    first = program * blocks
    if WIDE:
        first = first.to(tl.int64)
    for block in range(first, first + blocks):
        at = block * BLOCK + tl.arange(0, BLOCK)
        element = at[:, None] * 8 + tl.arange(0, 8)[None, :]
        rank = _rank(scores_ptr, element, element < n, INFINITY)
        keep = (rank < limit) & (element < n)
        equal = ((rank == limit) & (element < n)).to(tl.int32)
        here = tl.sum(tl.sum(equal, 1), 0)
        # Few blocks hold equals of the k-th: the others need no order.
        if here > 0:
            order = tl.reshape(tl.cumsum(tl.reshape(equal, (BLOCK * 8,)), 0), (BLOCK, 8))
            keep = keep | ((equal > 0) & (seen + order <= place))
            seen += here
        tl.store(bits_ptr + at, packed.collect(keep), mask=at < size)


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """Packed bits (bytes,) of the k largest scores; NaN ranks with -inf."""
    scores = scores.contiguous()
    n = scores.numel()
    size, k = packed_bytes(n), kept(n, density)
    if k == 0:
        return torch.zeros(size, dtype=torch.uint8, device=scores.device)
    bits = torch.empty(size, dtype=torch.uint8, device=scores.device)
    widths = _widths(scores.element_size(), n)
    number = triton.cdiv(size, BYTES)
    blocks = triton.cdiv(number, min(number, MOST))
    programs = triton.cdiv(number, blocks)
    # A line for each digit: the digits before it, the place of the k-th among their ranks, counts.
    rows = torch.zeros((len(widths), 2 + 2 ** max(widths)), dtype=torch.int64, device=scores.device)
    parts = torch.empty((2 ** widths[-1], programs), dtype=torch.int32, device=scores.device)
    values = scores.view(torch.int32 if scores.element_size() == 4 else torch.int16)
    switches = {
        "INFINITY": _INFINITY[scores.dtype],
        "WIDE": launch.wide(size * 8),
        "enable_fp_fusion": False,
    }
    shift = 8 * scores.element_size()
    with launch.on(scores):
        for i, width in enumerate(widths):
            shift -= width
            _count[(programs,)](
                values, rows[i - 1] if i else None, rows[i], parts if shift == 0 else None,
                n, k, shift, blocks,
                BEFORE=2 ** widths[i - 1] if i else 0, BINS=2**width, BLOCK=BYTES * 8, **switches,
            )  # fmt: skip
        _keep[(programs,)](
            values, rows[-1], parts, bits, n, size, blocks,
            BINS=2 ** widths[-1], BLOCK=BYTES, PROGRAMS=triton.next_power_of_2(programs), **switches,
        )  # fmt: skip
    return bits


def _widths(itemsize: int, n: int) -> tuple[int, ...]:
    """Bits of each digit, the highest first.

    An element's share of a histogram of 64 values is some 30 instructions, of 256 some 90: the first keeps
    nearly up with memory, the second has half the launches.
    """
    if n <= SMALL:
        return (8,) * itemsize
    return (6, 6, 5, 5, 5, 5) if itemsize == 4 else (6, 5, 5)
