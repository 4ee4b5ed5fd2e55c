"""learned_weight: a masked weight itself, its mask learned through its scores, straight-through."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _stepping
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register
from fastmask.ops.learned_linear.op import learned_options
from fastmask.ops.sample_mask.op import seed_tensor


def learned_weight(
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
    backend: str = "auto",
) -> Tensor:
    """Compute `W' = a * where(b, weight, off)` with bits b that scores decide and gradients reach.

    The weight that `learned_linear` and `learned_conv2d` read, for modules that read a weight by another
    rule (attention, say); where one of those serves, it needs no copy of the weight.

    Args:
        weight: floating, of any shape but 0-d.
        scores: logits or scores, floating, of the weight's shape; keep them float32.
        method: `gumbel`, `threshold` or `topk`, as all options that follow those of `learned_linear`.
        seed: gumbel: whole number in [0, 2**64), a 0-d int64 tensor, or None for `draw_seed`.
        samples: gumbel: number S of masks; sample i is the same whatever S is.
        tau: gumbel: temperature, in [1e-30, 1e30]; it changes the gradient, not the bits.
        mu: threshold: scores above it are active.
        density: topk: share of active weights, in [0, 1].
        off: what an inactive weight is read as: `zero` or `flip`.
        scale: None or `rsqrt_density`.
        backend: `auto` or the name of a back end.

    Returns:
        (S, *weight.shape), dtype of weight; S is 1 for threshold and topk.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; an option is out of its range or belongs
            to another method; `scale` with `off="flip"`.
        BackendUnavailable: the back end named cannot run.

    Gradients: weight and scores, as `learned_linear` gives them with `dL/dW'` for G. Once differentiable.
    Deterministic: given the seed. Autocast: none; weight and scores keep their dtypes.
    Source: arXiv 2308.13957, 5.3 (gumbel); arXiv 2409.07577, Eq. 1 (threshold, topk, flip, scale).
    """
    _checks.floating("weight", weight)
    if weight.dim() == 0:
        raise ValueError("weight: expected at least one dimension, got a 0-d tensor")
    checked = learned_options(weight, scores, method, seed, samples, tau, mu, density, off, scale)
    _stepping.step_of(scores, weight.dtype)
    # Only sampled bits take a seed: the others must not advance torch's generator.
    key = seed_tensor(seed, scores) if method == "gumbel" else None
    out, _ = _LearnedWeight.apply(weight, scores, key, (*checked, backend))
    return out


class _LearnedWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, scores: Tensor, seed: Tensor | None, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        method, samples, _, *rest = options
        return torch.ops.fastmask.learned_weight(weight, scores, seed, method, samples, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, scores, seed, ctx.options = inputs
        ctx.save_for_backward(weight, scores, output[1], seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        weight, scores, active, seed = ctx.saved_tensors
        method, _, tau, _, _, off, rescale, backend = ctx.options
        wanted = list(ctx.needs_input_grad[:2])
        grads = torch.ops.fastmask.learned_weight_grad(
            grad, weight, scores, active, seed, method, tau, off, rescale, wanted, backend
        )
        asked = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *asked, None, None


def _forward(
    weight: Tensor,
    scores: Tensor,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _backend.resolve("learned_weight", backend, weight.device, weight.dtype)
    return module.learned_weight(weight, scores, seed, method, samples, mu, density, off, rescale)


def _forward_fake(
    weight: Tensor, scores: Tensor, seed: Tensor | None, method: str, samples: int, *_: Any
) -> tuple[Tensor, Tensor]:
    active = weight.new_empty((samples, packed_bytes(weight.numel())), dtype=torch.uint8)
    return weight.new_empty((samples, *weight.shape)), active


def _backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _backend.resolve("learned_weight", backend, grad.device, grad.dtype)
    return module.learned_weight_grad(
        grad, weight, scores, active, seed, method, tau, off, rescale, output_mask
    )


def _backward_fake(
    grad: Tensor, weight: Tensor, scores: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    of_weight, of_scores = rest[-2]
    return (
        weight.new_empty(weight.shape if of_weight else 0),
        scores.new_empty(scores.shape if of_scores else 0),
    )


register(
    "learned_weight(Tensor weight, Tensor scores, Tensor? seed, str method, SymInt samples, float mu, "
    "float? density, str off, bool rescale, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "learned_weight_grad(Tensor grad, Tensor weight, Tensor scores, Tensor active, Tensor? seed, "
    "str method, float tau, str off, bool rescale, bool[2] output_mask, str backend) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
