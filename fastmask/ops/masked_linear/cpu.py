"""The CPU engine's masked_linear: W is read once, through its bits, and no masked copy of it is made.

Under masks of ones alone a layer is torch's own product, so that a converted network keeps all its bits.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _cpu
from fastmask.ops.masked_linear import reference

DTYPES = (torch.float32, torch.bfloat16)
# Rows a mask in bfloat16 up to which W is multiplied as it is read, whatever instructions there are.
FEW = 8


def select(weight: Tensor, active: Tensor) -> Tensor:
    """Weights (S, *W.shape) with masked-out entries exactly 0, whatever they hold."""
    weight, active = weight.contiguous(), active.contiguous()
    out = weight.new_empty((len(active), *weight.shape))
    for bits, one in zip(active, out, strict=True):
        _select_into(one, weight, bits.data_ptr())
    return out


def _select_into(out: Tensor, weight: Tensor, bits: int) -> None:
    """Write where(bits, weight, 0) into `out`, which may be the weight, the bits lying at an address."""
    _cpu.select(
        weight.data_ptr(),
        weight.itemsize,
        bits,
        out.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def masked_linear(
    x: Tensor, weight: Tensor, active: Tensor, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """x (B, K) through where(active, W, 0) (N, K) of each row's mask, plus bias."""
    return _linear(x, weight, active, bias, groups)


def _linear(
    x: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    flip: bool = False,
    scales: Tensor | None = None,
) -> Tensor:
    """The same with -W for what is masked out, or weights times their mask's scale (S), 1 for ones alone."""
    weight, active = weight.contiguous(), active.contiguous()
    (n, k), samples, count = weight.shape, active.shape[0], x.shape[0]
    bits = active.data_ptr()
    if _cpu.all_ones(bits, samples, n * k):
        return F.linear(x, weight, bias)
    if count > FEW * samples and _left_to_torch(x.dtype):
        if flip or scales is not None:
            weights = _effective(weight.expand(samples, n, k), active, flip, scales)
            return reference.linear(x, weights, bias, groups)
        return _in_blocks(x, weight, active, bias, groups)
    rows, starts, order = _by_mask(x, groups, samples)
    bias = None if bias is None else bias.contiguous()
    y = rows.new_empty(count, n)
    _cpu.masked_linear(
        rows.data_ptr(),
        weight.data_ptr(),
        _kind(weight),
        bits,
        _address(starts),
        samples,
        _address(scales),
        int(flip),
        count,
        n,
        k,
        _address(bias),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


def grad_input(grad: Tensor, weight: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dx = dY where(active, W, 0)."""
    return _grad_input(grad, weight, active, groups)


def _grad_input(
    grad: Tensor,
    weight: Tensor,
    active: Tensor,
    groups: Tensor | None,
    flip: bool = False,
    scales: Tensor | None = None,
) -> Tensor:
    """dL/dx of _linear."""
    weight, active = weight.contiguous(), active.contiguous()
    (n, k), samples, count = weight.shape, active.shape[0], grad.shape[0]
    bits = active.data_ptr()
    if _cpu.all_ones(bits, samples, n * k):
        return grad @ weight
    if count > FEW * samples and _left_to_torch(grad.dtype):
        weights = _effective(weight.expand(samples, n, k), active, flip, scales)
        return reference.linear_grad_input(grad, weights, groups)
    rows, starts, order = _by_mask(grad, groups, samples)
    dx = rows.new_empty(count, k)
    _cpu.masked_linear_grad_input(
        rows.data_ptr(),
        weight.data_ptr(),
        _kind(weight),
        bits,
        _address(starts),
        samples,
        _address(scales),
        int(flip),
        count,
        n,
        k,
        dx.data_ptr(),
        torch.get_num_threads(),
    )
    return dx if order is None else torch.empty_like(dx).index_copy_(0, order, dx)


def grad_weight(grad: Tensor, x: Tensor, active: Tensor, groups: Tensor | None) -> Tensor:
    """dL/dW = sum over masks of where(active_s, dY_s^T X_s, 0): torch's product, selected in one pass."""
    active = active.contiguous()
    if len(active) == 1:
        # Selected where it lies: fresh memory costs more than the product of 8 rows.
        out = (grad.T @ x).contiguous()
        _select_into(out, out, active.data_ptr())
        return out
    out = grad.new_empty((grad.shape[1], x.shape[1]), dtype=torch.float32)
    for s, rows in enumerate(reference.rows_of(groups, len(active), len(x))):
        _add_selected((grad[rows].T @ x[rows]).float().contiguous(), active[s], s > 0, out)
    return out.to(grad.dtype)


def _effective(weights: Tensor, active: Tensor, flip: bool, scales: Tensor | None) -> Tensor:
    """scales[s] * where(active[s], weights[s], 0 or, to flip, -weights[s]), (S, ...), contiguous."""
    out = weights.new_empty(weights.shape)
    factors = [1.0] * len(active) if scales is None else scales.tolist()
    for weight, bits, factor, one in zip(weights, active, factors, out, strict=True):
        weight, bits = weight.contiguous(), bits.contiguous()
        _cpu.effective_weight(
            weight.data_ptr(),
            _kind(weight),
            bits.data_ptr(),
            weight.numel(),
            int(flip),
            factor,
            one.data_ptr(),
            torch.get_num_threads(),
        )
    return out


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


def _left_to_torch(dtype: torch.dtype) -> bool:
    """Many rows in bfloat16 where torch's product has instructions for it that these kernels lack."""
    return dtype == torch.bfloat16 and (_cpu.isa() != "avx512bf16" or _has_tiles())


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor has AMX, 4 times as fast as vdpbf16ps and used by torch's product."""
    return bool(torch.cpu._is_amx_tile_supported())


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
            _select_into(chosen, part, bits.data_ptr() + begin * k // 8)
            out[rows, here] = F.linear(x[rows], chosen, None if bias is None else bias[here])
    return out


def _by_mask(
    x: Tensor, groups: Tensor | None, samples: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows in the order of their masks, where each mask's rows start, and that order."""
    if groups is None:
        return x.contiguous(), None, None
    order = torch.argsort(groups, stable=True)
    starts = groups.new_zeros(samples + 1)
    starts[1:] = torch.bincount(groups, minlength=samples).cumsum(0)
    return x[order], starts, order


def _kind(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
