"""The CPU engine's compressed_linear: values are put in their places as they are multiplied, or by blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.compressed_linear.reference import as_many

DTYPES = (torch.float32, torch.bfloat16)

# Elements of such a block: its 4 MB stay in the second cache of two cores, nearly.
BLOCK = 1 << 20


def compressed_linear(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x (B, K) through the weight (N, K) of the kept values, plus bias."""
    n, k = out_features, x.shape[1]
    values, active = values.contiguous(), active.contiguous()
    starts = _starts(active, n, k)
    as_many(values, int(starts[-1]))
    if len(x) > _few(x.dtype) and k > 0:
        # W on the left: so torch multiplies 256 x 4096 weights and 64 rows in 0.75 of the time.
        out, across = x.new_empty(n, len(x)), x.t().contiguous()
        for first, block in _blocks(values, active, starts, n, k):
            torch.mm(block, across, out=out[first : first + len(block)])
        return out.t().contiguous() if bias is None else out.t().add(bias)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(len(x), n)
    _cpu.compressed_linear(
        x.data_ptr(),
        values.data_ptr(),
        _kind(values),
        active.data_ptr(),
        starts.data_ptr(),
        len(x),
        n,
        k,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def grad_input(grad: Tensor, values: Tensor, active: Tensor, in_features: int) -> Tensor:
    """dL/dx = dY W."""
    n, k = grad.shape[1], in_features
    values, active = values.contiguous(), active.contiguous()
    starts = _starts(active, n, k)
    # Sums of blocks in bfloat16 would be rounded once a block: there the weight is one block.
    size = BLOCK if grad.dtype == torch.float32 else n * k
    dx = grad.new_zeros(len(grad), k)
    for first, block in _blocks(values, active, starts, n, k, size):
        dx.addmm_(grad[:, first : first + len(block)], block)
    return dx


def _few(dtype: torch.dtype) -> int:
    """Rows of x up to which dot products over the values win over blocks of W for torch's product."""
    fast = "avx512bf16" if dtype == torch.bfloat16 else "avx512"
    return 64 if _cpu.isa().startswith(fast) else 16


def _starts(active: Tensor, n: int, k: int) -> Tensor:
    """How many ones there are before each row of the weight, and in all."""
    starts = torch.empty(n + 1, dtype=torch.int64)
    _cpu.count_ones(active.data_ptr(), n, k, starts.data_ptr(), torch.get_num_threads())
    return starts


def _blocks(
    values: Tensor, active: Tensor, starts: Tensor, n: int, k: int, size: int = BLOCK
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the rows of each block of the weight, which is overwritten by the next."""
    if k == 0:
        return
    scratch = values.new_empty(min(max(1, size // k), n), k)
    for first in range(0, n, len(scratch)):
        count = min(len(scratch), n - first)
        _cpu.expand_values(
            values.data_ptr(),
            _kind(values),
            active.data_ptr(),
            starts.data_ptr(),
            n,
            k,
            first,
            count,
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        yield first, scratch[:count]


def _kind(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)
