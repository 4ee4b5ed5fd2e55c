"""The CPU engine's masked_linear: W is read once, through its bits, and no masked copy of it is made.

Under masks of ones alone a layer is torch's own product, so that a converted network keeps all its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.masked_linear import reference

DTYPES = (torch.float32, torch.bfloat16)
# Rows a mask up to which dot products are faster than panels of transposed rows.
FEW = 8
# A multiple of every instruction set's panel, to which the rows of each mask are padded.
PANEL = 64


def select(weight: Tensor, active: Tensor) -> Tensor:
    """Weights (S, *W.shape) with masked-out entries exactly 0, whatever they hold."""
    weight, active = weight.contiguous(), active.contiguous()
    out = weight.new_empty((len(active), *weight.shape))
    for bits, one in zip(active, out, strict=True):
        if weight.dtype == torch.float32:
            _add_selected(weight, bits, False, one)
        else:
            _select_halves(weight, bits.data_ptr(), one)
    return out


def masked_linear(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias."""
    weight, active = weight.contiguous(), active.contiguous()
    if _all_ones(active, weight):
        return F.linear(x, weight, bias)
    if _left_to_torch(x, active):
        return _in_blocks(x, weight, active, bias, groups)
    rows, starts, order = _by_mask(x, groups, len(active))
    y = rows.new_empty(len(rows), len(weight))
    bias = None if bias is None else bias.float().contiguous()
    panels = _panels(rows, len(active))
    _cpu.masked_linear(
        rows.data_ptr(),
        weight.data_ptr(),
        _kind(weight),
        active.data_ptr(),
        _address(starts),
        len(active),
        len(rows),
        weight.shape[0],
        weight.shape[1],
        _address(bias),
        y.data_ptr(),
        _address(panels),
        torch.get_num_threads(),
    )
    return _in_order(y, order, x.dtype)


def grad_input(grad: Tensor, weight: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dx = dY where(active, W, 0)."""
    weight, active = weight.contiguous(), active.contiguous()
    if _all_ones(active, weight):
        return grad @ weight
    if _left_to_torch(grad, active):
        return reference.linear_grad_input(grad, select(weight, active), groups)
    rows, starts, order = _by_mask(grad, groups, len(active))
    dx = rows.new_empty(len(rows), weight.shape[1])
    panels = _panels(rows, len(active))
    _cpu.masked_linear_grad_input(
        rows.data_ptr(),
        weight.data_ptr(),
        _kind(weight),
        active.data_ptr(),
        _address(starts),
        len(active),
        len(rows),
        weight.shape[0],
        weight.shape[1],
        dx.data_ptr(),
        _address(panels),
        torch.get_num_threads(),
    )
    return _in_order(dx, order, grad.dtype)


def grad_weight(grad: Tensor, x: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dY_s^T X_s, 0): torch's product, selected in one pass."""
    active = active.contiguous()
    out = grad.new_empty((grad.shape[1], x.shape[1]), dtype=torch.float32)
    for s, rows in enumerate(reference.rows_of(groups, len(active), len(x))):
        _add_selected((grad[rows].T @ x[rows]).float().contiguous(), active[s], s > 0, out)
    return out.to(grad.dtype)


def _add_selected(dense: Tensor, bits: Tensor, add: bool, out: Tensor) -> None:
    """Write where(bits, dense, 0) into `out`, or add it there."""
    _cpu.add_selected(
        dense.data_ptr(),
        bits.data_ptr(),
        out.numel(),
        int(add),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _all_ones(active: Tensor, weight: Tensor) -> bool:
    """Whether nothing is masked: found at the first word where something is."""
    found = active.new_empty((), dtype=torch.int64)
    _cpu.all_ones(active.data_ptr(), len(active), weight.numel(), found.data_ptr())
    return bool(found.item())


def _left_to_torch(x: Tensor, active: Tensor) -> bool:
    """Many rows in bfloat16: torch's product has instructions for it, which these kernels lack."""
    return x.dtype == torch.bfloat16 and len(x) > FEW * len(active)


def _in_blocks(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """torch's product with one block of masked rows of W after the other, in scratch that stays in cache."""
    n, k = weight.shape
    block = 64 * max(1, 2**20 // (64 * max(k, 1)))  # 64 rows begin on a word of the mask
    out, scratch = x.new_empty(len(x), n), weight.new_empty(min(block, n), k)
    parts = reference.rows_of(groups, len(active), len(x))
    for begin in range(0, n, block):
        here = slice(begin, begin + block)
        part = weight[here]
        for bits, rows in zip(active, parts, strict=True):
            chosen = scratch[: len(part)]
            _select_halves(part, bits.data_ptr() + begin * k // 8, chosen)
            out[rows, here] = F.linear(x[rows], chosen, None if bias is None else bias[here])
    return out


def _select_halves(weight: Tensor, bits: int, out: Tensor) -> None:
    """Write where(bits, weight, 0) of 16-bit numbers into `out`, the bits lying at an address."""
    _cpu.select_halves(
        weight.data_ptr(), bits, out.numel(), out.data_ptr(), torch.get_num_threads()
    )


def _by_mask(
    x: Tensor, groups: Tensor | None, samples: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows as float32 in the order of their masks, where each mask's rows start, and that order."""
    if groups is None:
        return x.float().contiguous(), None, None
    order = torch.argsort(groups, stable=True)
    starts = groups.new_zeros(samples + 1)
    starts[1:] = torch.bincount(groups, minlength=samples).cumsum(0)
    return x[order].float(), starts, order


def _in_order(rows: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    if order is None:
        return rows.to(dtype)
    return rows.new_empty(rows.shape, dtype=dtype).index_copy_(0, order, rows.to(dtype))


def _panels(rows: Tensor, samples: int) -> Tensor | None:
    """Scratch for the transposed rows of each mask; None for few rows, which need none."""
    if len(rows) <= FEW * samples:
        return None
    return rows.new_empty((len(rows) + samples * (PANEL - 1)) * rows.shape[1])


def _kind(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
