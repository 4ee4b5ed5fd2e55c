"""learned_conv2d: a convolution whose mask is learned through its scores, straight-through."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _eager, _stepping
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register
from fastmask.ops.learned_linear.op import learned_options
from fastmask.ops.masked_conv2d import reference as convolution
from fastmask.ops.masked_conv2d.op import Padding, Pair, conv2d_arguments
from fastmask.ops.sample_mask.op import seed_tensor


def learned_conv2d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    *,
    method: Literal["gumbel", "threshold", "topk"] = "gumbel",
    seed: int | Tensor | None = None,
    samples: int = 1,
    tau: float = 1.0,
    mu: float = 0.0,
    density: float | None = None,
    off: Literal["zero", "flip"] = "zero",
    scale: Literal["rsqrt_density"] | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Compute `conv2d(x, a * where(b, weight, off), bias)` with bits b decided by scores, which learn.

    The bits, `off` and `a` are those of `learned_linear`, over the weight in logical order; the
    convolution is that of `masked_conv2d`. The images of x are S equal consecutive groups, each under a
    mask of its own.

    Args:
        x: floating (B, C, H, W), or one image (C, H, W); any memory format.
        weight: (N, C / groups, R, T), dtype of x, any memory format.
        scores: logits or scores, floating, shape of weight; keep them float32, whatever the weight is.
        method: `gumbel`, `threshold` or `topk`. An option of another method is refused.
        seed: gumbel: whole number in [0, 2**64), a 0-d int64 tensor, or None for `draw_seed`.
        samples: gumbel: number S of masks; sample i is the same whatever S is.
        tau: gumbel: temperature, in [1e-30, 1e30]; it changes the gradient, not the bits.
        mu: threshold: scores above it are active.
        density: topk: share of active weights, in [0, 1].
        off: `zero` or `flip`.
        scale: None or `rsqrt_density`.
        bias: (N,), dtype of x, or None.
        stride: steps, one number or one for each of height and width.
        padding: zeros on either side, one number or a pair; `valid` is none, `same` keeps H and W.
        dilation: spacing of the kernel's elements, one number or a pair.
        groups: number of groups of channels; C for a depthwise convolution.
        backend: `auto` or the name of a back end.

    Returns:
        (B, N, H', W') or (N, H', W'), dtype of x, in the memory format that `conv2d` gives.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; S does not divide B; an option is out of
            its range or belongs to another method; `scale` with `off="flip"`.
        BackendUnavailable: the back end named cannot run.

    Gradients: x, weight, bias and scores as those of `learned_linear`, with G the gradient of a sample's
        convolution in its weight. Once differentiable.
    Deterministic: given the seed, as `torch.nn.functional.conv2d`. Autocast: as
        `torch.nn.functional.conv2d`; scores keep their dtype.
    Source: arXiv 2308.13957, 5.3 (gumbel); arXiv 2409.07577, Eq. 1 (threshold, topk, flip, scale).
    """
    images, cast, bias, geometry = conv2d_arguments(
        x, weight, bias, stride, padding, dilation, groups
    )
    checked = learned_options(weight, scores, method, seed, samples, tau, mu, density, off, scale)
    _checks.images(images, samples, "samples")
    _stepping.step_of(scores, cast.dtype)
    # Only sampled bits take a seed: the others must not advance torch's generator.
    key = seed_tensor(seed, scores) if method == "gumbel" else None
    options = (*checked, backend)
    tensors = images, cast, scores, bias, key
    compute = _Undispatched if _eager.plain_call(*tensors) else _LearnedConv2d
    out, _ = compute.apply(*tensors, geometry, options)
    return out.squeeze(0) if x.dim() == 3 else out


class _LearnedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        geometry: tuple[Any, ...],
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        method, samples, _, *rest = options
        return torch.ops.fastmask.learned_conv2d(
            x, weight, scores, bias, seed, *geometry, method, samples, *rest
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, scores, _, seed, ctx.geometry, ctx.options = inputs
        ctx.size = x.shape
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # The bits are kept: 1/32 of the scores' bytes, against drawing or sorting again.
        ctx.save_for_backward(x if needs_x else None, weight, scores, output[1], seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, scores, active, seed = ctx.saved_tensors
        method, _, tau, _, _, off, rescale, backend = ctx.options
        wanted = list(ctx.needs_input_grad[:4])
        plain = _eager.plain_call(grad, x, weight, scores)
        compute = _backward if plain else torch.ops.fastmask.learned_conv2d_grad
        grads = compute(
            grad, x, weight, scores, active, seed, ctx.size, *ctx.geometry, method, tau, off, rescale,
            wanted, backend,
        )  # fmt: skip
        asked = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *asked, None, None, None


class _Undispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, geometry, (method, samples, _, *rest) = inputs
        output = _forward(*tensors, *geometry, method, samples, *rest)
        _LearnedConv2d.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _LearnedConv2d.backward(ctx, *grads)


def _forward(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor]:
    *options, backend = options_and_backend
    module = _backend.resolve("learned_conv2d", backend, x.device, x.dtype)
    return module.learned_conv2d(x, weight, scores, bias, seed, *options)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    samples: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    active = x.new_empty((samples, packed_bytes(weight.numel())), dtype=torch.uint8)
    return convolution.conv2d(x, [weight], bias, stride, padding, dilation, groups), active


def _backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, backend = options_and_backend
    module = _backend.resolve("learned_conv2d", backend, grad.device, grad.dtype)
    return module.learned_conv2d_grad(grad, x, weight, scores, active, seed, *options)


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    size: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x, of_weight, of_scores, of_bias = rest[-2]
    dx = convolution.conv2d_grad_input(grad, [weight], size, *rest[:4]) if of_x else None
    return (
        grad.new_empty(0) if dx is None else dx,
        weight.new_empty(weight.shape if of_weight else 0),
        scores.new_empty(scores.shape if of_scores else 0),
        grad.new_empty(grad.shape[1] if of_bias else 0),
    )


_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"

register(
    "learned_conv2d(Tensor x, Tensor weight, Tensor scores, Tensor? bias, Tensor? seed, "
    f"{_GEOMETRY}, str method, SymInt samples, float mu, float? density, str off, bool rescale, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "learned_conv2d_grad(Tensor grad, Tensor? x, Tensor weight, Tensor scores, Tensor active, "
    f"Tensor? seed, SymInt[] input_size, {_GEOMETRY}, str method, float tau, str off, bool rescale, "
    "bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
