"""The CUDA engine's compressed_linear: the places of values are counted from the bits in each call.

For few rows; more are right and read the values again for every four. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import KINDS, address, place

DTYPES = tuple(KINDS)
# Rows up to which `auto` takes it: the reference writes and reads the whole weight, about 10 bytes an entry.
MOST_ROWS = 16
# Columns of a tile, and tiles that one block counts, in csrc/cuda/compressed_linear.cu.
COLUMNS, COUNTED = 1024, 256


def compressed_linear(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x (B, K) through the weight (N, K) of the kept values, plus bias."""
    (b, k), n = x.shape, out_features
    x, values = x.contiguous(), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    bits = active.contiguous()
    if bits.data_ptr() % 8 != 0:
        bits = bits.clone()
    chunks = -(-k // COLUMNS)
    places = n * chunks + 1
    y = torch.empty((b, n), dtype=x.dtype, device=x.device)
    offsets = torch.empty(places + -(-places // COUNTED), dtype=torch.int64, device=x.device)
    sums = torch.empty((chunks, b, n), dtype=torch.float32, device=x.device)
    _cuda.compressed_linear(
        x.data_ptr(),
        values.data_ptr(),
        KINDS[x.dtype],
        values.numel(),
        bits.data_ptr(),
        b,
        n,
        k,
        address(bias),
        y.data_ptr(),
        offsets.data_ptr(),
        sums.data_ptr(),
        *place(x),
    )
    return y
