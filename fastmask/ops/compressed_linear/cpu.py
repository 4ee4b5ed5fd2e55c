"""The CPU engine's compressed_linear: values are put in their places as they are multiplied, or by blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.compressed_linear.reference import as_many

DTYPES = (torch.float32, torch.bfloat16)

# Rows of x up to which dot products over the values win over blocks put in their places for torch's product.
FEW_ROWS = 8
# Elements of such a block: its 4 MB stay in the second cache of two cores, nearly.
BLOCK = 1 << 20


def compressed_linear(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x (B, K) through the weight (N, K) of the kept values, plus bias."""
    n, k = out_features, x.shape[1]
    values, active = values.contiguous(), active.contiguous()
    rows = _rows(k)
    starts = _starts(active, n * k, rows * k)
    as_many(values, int(starts[-1]))
    if k == 0:
        # There are no pieces.
        zeros = x.new_zeros(len(x), n)
        return zeros if bias is None else zeros + bias
    if len(x) > FEW_ROWS:
        # W on the left: so torch multiplies 256 x 4096 weights and 64 rows in 0.75 of the time.
        out, across = x.new_empty(n, len(x)), x.t().contiguous()
        for first, block in _blocks(values, active, starts, n, k, rows):
            torch.mm(block, across, out=out[first : first + len(block)])
        return out.t().contiguous() if bias is None else out.t().add(bias)
    x32, bias32 = x.float().contiguous(), None if bias is None else bias.float().contiguous()
    y = torch.empty(len(x), n, dtype=torch.float32)
    _cpu.compressed_linear(
        x32.data_ptr(),
        values.data_ptr(),
        _kind(values),
        active.data_ptr(),
        starts.data_ptr(),
        rows,
        len(x),
        n,
        k,
        0 if bias32 is None else bias32.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y.to(x.dtype)


def grad_input(grad: Tensor, values: Tensor, active: Tensor, in_features: int) -> Tensor:
    """dL/dx = dY W."""
    n, k = grad.shape[1], in_features
    values, active = values.contiguous(), active.contiguous()
    rows = _rows(k)
    starts = _starts(active, n * k, rows * k)
    # Sums of blocks in bfloat16 would be rounded once a block: there the weight is one block.
    size = BLOCK if grad.dtype == torch.float32 else n * k
    dx = grad.new_zeros(len(grad), k)
    for first, block in _blocks(values, active, starts, n, k, rows, size):
        dx.addmm_(grad[:, first : first + len(block)], block)
    return dx


def _rows(k: int) -> int:
    """Rows of a piece, a task of one thread: an even number, of about 65,536 weights."""
    return max(1, 32768 // max(k, 1)) * 2


def _starts(active: Tensor, elements: int, piece: int) -> Tensor:
    """How many ones there are before each piece of so many elements, and in all."""
    starts = torch.zeros(-(-elements // max(piece, 1)) + 1, dtype=torch.int64)
    if elements:
        threads = torch.get_num_threads()
        _cpu.count_ones(active.data_ptr(), elements, piece, starts.data_ptr(), threads)
    return starts


def _blocks(
    values: Tensor, active: Tensor, starts: Tensor, n: int, k: int, rows: int, size: int = BLOCK
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the rows of each block of the weight, which is overwritten by the next."""
    if n * k == 0:
        return
    pieces = max(1, size // (rows * k))
    scratch = values.new_empty(min(pieces * rows, n), k)
    for piece in range(0, len(starts) - 1, pieces):
        count = min(pieces, len(starts) - 1 - piece)
        _cpu.expand_values(
            values.data_ptr(),
            _kind(values),
            active.data_ptr(),
            starts.data_ptr(),
            rows * k,
            n * k,
            piece,
            count,
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        yield piece * rows, scratch[: min(count * rows, n - piece * rows)]


def _kind(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)
