"""compressed_linear: a linear layer stored as a bitmap and the kept values alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _eager
from fastmask.ops._layout import numel_of, packed_bytes
from fastmask.ops._register import register
from fastmask.ops.compressed_linear.reference import as_many, dense
from fastmask.ops.popcount.op import popcount
from fastmask.ops.unpack.op import unpack


def compressed_linear(
    x: Tensor,
    values: Tensor,
    active: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute `x @ decompress(values, active, (N, K)).T + bias` for inference, K being x's last dimension.

    The weight takes one bit an entry and its kept values: `compress(weight, active)`.

    Args:
        x: floating (..., K).
        values: kept values in element order, (number of ones,), dtype of x.
        active: packed bits of the (N, K) weight, uint8 (bytes,).
        out_features: N.
        bias: (N,), dtype of x, or None.
        backend: `auto` or the name of a back end.

    Returns:
        (..., N), dtype of x.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; values or bias ask for a gradient; on
            the CPU, the number of values is not the number of ones.
        BackendUnavailable: the back end named cannot run.

    Gradients: x. Values and bias that require one are refused while gradients are recorded. Once
        differentiable.
    Deterministic: yes. Autocast: as `torch.nn.functional.linear`.
    """
    if _eager.unwatched() and _fits(x, values, active, out_features, bias):
        # Past torch's dispatcher: 14 us a call instead of 60 to 100 (8 x 64, one row, Zen 4).
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = _forward(rows, values, active, out_features, bias, backend)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out_features)
    _checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., K), got ()")
    out_features = _checks.count("out_features", out_features)
    n, k = out_features, x.shape[-1]
    _one_mask(active, (n, k), x)
    given = [("values", values), *([("bias", bias)] if bias is not None else [])]
    for name, tensor in given:
        _checks.floating(name, tensor)
        _checks.same(name, _checks.autocast(tensor), "x", _checks.autocast(x))
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad (compressed_linear is inference: "
                f"train with masked_linear, then compress), got one with it"
            )
    _one_dimension(values)
    if bias is not None:
        _checks.shape("bias", bias, (n,), "one value for each output")
        bias = _checks.autocast(bias)
    x, values = _checks.autocast(x), _checks.autocast(values)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), k)
    out = _CompressedLinear.apply(rows, values, active, out_features, bias, backend)
    return out.view(*x.shape[:-1], n) if x.dim() != 2 else out


def _fits(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None
) -> bool:
    """Whether an ordinary call on the CPU without gradients would pass all checks, said in microseconds."""
    tensors = (x, values, active) if bias is None else (x, values, active, bias)
    if not all(map(_eager.ordinary, tensors)) or type(out_features) is not int:
        return False
    dtype, n = x.dtype, out_features
    return (
        dtype in _checks.FLOATING
        and dtype is values.dtype
        and active.dtype is torch.uint8
        and n > 0
        and x.dim() > 0
        and x.shape[-1] > 0
        and values.dim() == 1
        and active.shape == (packed_bytes(n * x.shape[-1]),)
        and (bias is None or (bias.dtype is dtype and bias.shape == (n,)))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def compress(weight: Tensor, active: Tensor) -> Tensor:
    """Gather the kept values of a weight: `weight.flatten()[unpack(active)]`.

    Args:
        weight: tensor of any shape and dtype.
        active: its packed bits, uint8 (bytes,).

    Returns:
        (number of ones,) in element order, dtype of weight, with no gradient. Waits for the device.

    Raises:
        TypeError, ValueError: `active` is not one mask of this weight.
    """
    _checks.tensor("weight", weight)
    _one_mask(active, weight.shape, weight)
    return weight.detach()[unpack(active, weight.shape)]


def decompress(values: Tensor, active: Tensor, shape: Sequence[int]) -> Tensor:
    """Scatter kept values over zeros: the inverse of `compress` but for the entries it dropped.

    Args:
        values: kept values in element order, (number of ones,).
        active: packed bits, uint8 (bytes,).
        shape: of the weight.

    Returns:
        Tensor of this shape, dtype of values. Waits for the device.

    Raises:
        TypeError, ValueError: `active` is not one mask of this shape; another number of values than ones.
    """
    _checks.tensor("values", values)
    _one_dimension(values)
    _one_mask(active, shape, values)
    as_many(values, int(popcount(active)))
    return dense(values.detach(), active, tuple(shape))


def _one_mask(active: Tensor, shape: Sequence[int], like: Tensor) -> None:
    _checks.tensor("active", active)
    if active.dtype != torch.uint8:
        raise TypeError(
            f"active: expected packed bits (uint8, see fastmask.ops.pack), got {active.dtype}"
        )
    size = packed_bytes(numel_of(shape))
    _checks.shape("active", active, (size,), f"the packed bits of a weight {tuple(shape)}")
    if active.device != like.device:
        raise ValueError(f"active: expected a tensor on {like.device}, got one on {active.device}")


def _one_dimension(values: Tensor) -> None:
    if values.dim() != 1:
        raise ValueError(f"values: expected shape (number of ones,), got {tuple(values.shape)}")


class _CompressedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        active: Tensor,
        out_features: int,
        bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        return torch.ops.fastmask.compressed_linear(x, values, active, out_features, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, active, _, _, ctx.backend = inputs
        ctx.in_features = x.shape[1]
        ctx.save_for_backward(values, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, active = ctx.saved_tensors
        dx = torch.ops.fastmask.compressed_linear_grad_input(
            grad, values, active, ctx.in_features, ctx.backend
        )
        return dx, None, None, None, None, None


def _forward(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None, backend: str
) -> Tensor:
    module = _backend.resolve("compressed_linear", backend, x.device, x.dtype, rows=len(x))
    return module.compressed_linear(x, values, active, out_features, bias)


def _forward_fake(
    x: Tensor, values: Tensor, active: Tensor, out_features: int, bias: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _grad_input(
    grad: Tensor, values: Tensor, active: Tensor, in_features: int, backend: str
) -> Tensor:
    module = _backend.resolve("compressed_linear", backend, grad.device, grad.dtype, "grad_input")
    return module.grad_input(grad, values, active, in_features)


def _grad_input_fake(
    grad: Tensor, values: Tensor, active: Tensor, in_features: int, backend: str
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


register(
    "compressed_linear(Tensor x, Tensor values, Tensor active, SymInt out_features, Tensor? bias, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "compressed_linear_grad_input(Tensor grad, Tensor values, Tensor active, SymInt in_features, "
    "str backend) -> Tensor",
    _grad_input,
    _grad_input_fake,
)
