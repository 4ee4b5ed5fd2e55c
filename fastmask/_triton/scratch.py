"""Many rows through a masked weight: blocks of it are selected into memory that stays in L2.

The products are torch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmask._triton import launch, weights


@contextlib.contextmanager
def _plain(tensor: Tensor) -> Iterator[None]:
    """Products as they are written: no autocast, which reaches into backwards, and nothing recorded."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False), launch.on(tensor):
        yield


def forward(
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: Tensor | None,
    block: int,
    flip: bool,
    scale: Tensor | None,
) -> Tensor:
    """x (B, K), in equal groups, through the weights (N, K) of their masks, in blocks of rows of W."""
    (N, K), per = weight.shape, len(x) // len(active)
    height = min(N, max(8, block // K))
    y = torch.empty((len(x), N), dtype=x.dtype, device=x.device)
    kept = torch.empty(height * K, dtype=x.dtype, device=x.device)
    with _plain(x):
        for s, bits in enumerate(active):
            own, a = slice(s * per, (s + 1) * per), None if scale is None else scale[s : s + 1]
            for top in range(0, N, height):
                end = min(N, top + height)
                w = weights.window(weight, bits, (top, end), (0, K), kept, flip, a)
                if bias is None:
                    torch.mm(x[own], w.T, out=y[own, top:end])
                else:
                    torch.addmm(bias[top:end], x[own], w.T, out=y[own, top:end])
    return y


def grad_input(
    grad: Tensor, weight: Tensor, active: Tensor, block: int, flip: bool, scale: Tensor | None
) -> Tensor:
    """dY (B, N), in equal groups, times the weights of their masks, in blocks of columns of W."""
    (N, K), per = weight.shape, len(grad) // len(active)
    width = min(K, max(64, block // N // 64 * 64))
    dx = torch.empty((len(grad), K), dtype=grad.dtype, device=grad.device)
    kept = torch.empty(N * width, dtype=grad.dtype, device=grad.device)
    with _plain(grad):
        for s, bits in enumerate(active):
            own, a = slice(s * per, (s + 1) * per), None if scale is None else scale[s : s + 1]
            for left in range(0, K, width):
                end = min(K, left + width)
                w = weights.window(weight, bits, (0, N), (left, end), kept, flip, a)
                torch.mm(grad[own], w, out=dx[own, left:end])
    return dx


def grad_weight(
    grad: Tensor, x: Tensor, active: Tensor, flip: bool, scale: Tensor | None
) -> Tensor:
    """where(active, dY^T X, 0) of one mask: the product is selected where it lies."""
    with _plain(grad):
        dense = torch.mm(grad.T, x)
        return weights.add_selected(dense.unsqueeze(0), active, flip, scale, out=dense)
