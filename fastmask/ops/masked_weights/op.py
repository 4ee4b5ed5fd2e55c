"""masked_weights: the masked weights of many layers at once, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._register import register


def masked_weights(
    weights: Sequence[Tensor], active: Sequence[Tensor], *, backend: str = "auto"
) -> list[Tensor]:
    """Compute `where(active, weight, 0)` of many weights, on a GPU in one launch.

    For products that read whole weights, convolutions above all: a network of 50 layers has its weights
    in one launch instead of 50. `fastmask.nn.prepared` does that for the layers of a model.

    Args:
        weights: floating tensors of one dtype and device, of any shapes and memory formats.
        active: packed bits of each, uint8 (bytes,), 1 = takes part.
        backend: `auto` or the name of a back end.

    Returns:
        A tensor like each weight; under autocast in its dtype.

    Raises:
        TypeError, ValueError: lists of different lengths; dtype, device or shape do not fit.
        BackendUnavailable: the back end named cannot run.

    Gradients: weights, `where(active, dW', 0)`, in one launch too. Once differentiable.
    Deterministic: yes. Autocast: weights are rounded as `torch.nn.functional.conv2d` rounds them.
    """
    for name, given in (("weights", weights), ("active", active)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name}: expected a list of tensors, got {type(given).__name__}")
    if len(active) != len(weights):
        raise ValueError(
            f"active: expected {len(weights)} elements, one for each of weights, got {len(active)}"
        )
    for i, (weight, bits) in enumerate(zip(weights, active, strict=True)):
        _checks.floating(f"weights[{i}]", weight)
        _checks.same(f"weights[{i}]", weight, "weights[0]", weights[0])
        _checks.packed(f"active[{i}]", bits, weight.numel(), f"weights[{i}]", weight)
        _checks.shape(f"active[{i}]", bits, bits.shape[-1:], "one mask, not several")
    if not weights:
        return []
    dtype = _checks.autocast(weights[0][:0] if weights[0].dim() else weights[0]).dtype
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        # The compiler of torch 2.11 would hand its context to a forward of so many arguments.
        return torch.ops.fastmask.masked_weights(list(weights), list(active), dtype, backend)
    return list(_MaskedWeights.apply(len(weights), dtype, backend, *weights, *active))


class _MaskedWeights(torch.autograd.Function):
    @staticmethod
    def forward(count: int, dtype: torch.dtype, backend: str, *tensors: Tensor) -> Any:
        weights, active = list(tensors[:count]), list(tensors[count:])
        return tuple(torch.ops.fastmask.masked_weights(weights, active, dtype, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count, _, ctx.backend, *tensors = inputs
        ctx.dtype = tensors[0].dtype
        ctx.save_for_backward(*tensors[ctx.count :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i in range(ctx.count) if ctx.needs_input_grad[3 + i]]
        active = ctx.saved_tensors
        found = torch.ops.fastmask.masked_weights(
            [grads[i] for i in wanted], [active[i] for i in wanted], ctx.dtype, ctx.backend
        )
        of_weights: list[Tensor | None] = [None] * ctx.count
        for i, grad in zip(wanted, found, strict=True):
            of_weights[i] = grad
        return None, None, None, *of_weights, *[None] * ctx.count


def _implementation(
    weights: list[Tensor], active: list[Tensor], dtype: torch.dtype, backend: str
) -> list[Tensor]:
    one = weights[0]
    module = _backend.resolve("masked_weights", backend, one.device, one.dtype)
    return module.masked_weights(weights, active, dtype)


def _fake(
    weights: list[Tensor], active: list[Tensor], dtype: torch.dtype, backend: str
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


register(
    "masked_weights(Tensor[] weights, Tensor[] active, ScalarType dtype, str backend) -> Tensor[]",
    _implementation,
    _fake,
)
