"""learned_weights: the masked weights of many layers at once, their masks learned, straight-through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _stepping
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register
from fastmask.ops.learned_linear.op import check_method, check_off
from fastmask.ops.sample_mask.op import draw_seed, seed_tensor


def learned_weights(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    *,
    method: Literal["gumbel", "threshold", "topk"] = "gumbel",
    seeds: Sequence[int | Tensor] | Tensor | None = None,
    tau: float = 1.0,
    mu: float = 0.0,
    density: float | None = None,
    off: Literal["zero", "flip"] = "zero",
    backend: str = "auto",
) -> list[Tensor]:
    """Compute `where(b, weight, off)` of many weights with bits b that their scores decide and learn by.

    Each is `learned_weight` of one sample and no scale. On a GPU one launch draws and selects all of them,
    and one teaches all scores; `fastmask.nn.prepared` does that for the convolutions of a model.

    Args:
        weights: floating tensors of one dtype and device, of any shapes and memory formats.
        scores: logits or scores of each, floating, of one dtype and of its weight's shape; keep them float32.
        method: `gumbel`, `threshold` or `topk`, as all options that follow those of `learned_linear`.
        seeds: gumbel: of each weight what `learned_weight` takes for a seed, or an int64 tensor with one for
            each, or None for one draw of all: on the CPU it gives what so many calls of `draw_seed` give.
        tau: gumbel: temperature, in [1e-30, 1e30]; it changes the gradient, not the bits.
        mu: threshold: scores above it are active.
        density: topk: share of active weights, in [0, 1].
        off: what an inactive weight is read as: `zero` or `flip`.
        backend: `auto` or the name of a back end.

    Returns:
        A tensor like each weight; under autocast in its dtype.

    Raises:
        TypeError, ValueError: lists of different lengths; dtype, device or shape do not fit; an option is out
            of its range or belongs to another method.
        BackendUnavailable: the back end named cannot run.

    Gradients: weights and scores, as `learned_weight` gives them, in one launch too. Once differentiable.
    Deterministic: given the seeds. Autocast: weights are rounded first, as `torch.nn.functional.conv2d`
        rounds them; scores keep their dtype.
    Source: arXiv 2308.13957, 5.3 (gumbel); arXiv 2409.07577, Eq. 1 (threshold, topk, flip).
    """
    for name, given in (("weights", weights), ("scores", scores)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name}: expected a list of tensors, got {type(given).__name__}")
    if len(scores) != len(weights):
        raise ValueError(
            f"scores: expected {len(weights)} elements, one for each of weights, got {len(scores)}"
        )
    tau, density = check_method(method, None, 1, tau, mu, density)
    check_off(off, None)
    if seeds is not None and method != "gumbel":
        raise ValueError(f"seeds: an option of method='gumbel', got it with {method!r}")
    for i, (weight, own) in enumerate(zip(weights, scores, strict=True)):
        _checks.floating(f"weights[{i}]", weight)
        _checks.same(f"weights[{i}]", weight, "weights[0]", weights[0])
        _checks.floating(f"scores[{i}]", own)
        _checks.same(f"scores[{i}]", own, "scores[0]", scores[0])
        _checks.same(f"scores[{i}]", own, f"weights[{i}]", weight, dtype=False)
        _checks.shape(f"scores[{i}]", own, weight.shape, f"that of weights[{i}]")
    if not weights:
        return []
    # Only sampled bits take seeds: the others must not advance torch's generator.
    keys = _keys(seeds, len(weights), scores[0]) if method == "gumbel" else None
    dtype = _checks.autocast(weights[0][:0] if weights[0].dim() else weights[0]).dtype
    for own in scores:
        _stepping.step_of(own, dtype)  # raises where steps within the backward would be wrong
    options = (method, tau, float(mu), density, off, dtype, backend)
    made = _LearnedWeights.apply(len(weights), keys, options, *weights, *scores)
    return list(made[: len(weights)])


def _keys(seeds: Any, count: int, like: Tensor) -> Tensor:
    """A seed for each weight, int64 (count,)."""
    if seeds is None:
        return draw_seed(like.detach(), (count,))
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.shape != (count,):
            raise TypeError(
                f"seeds: expected an int64 tensor of shape ({count},), got {seeds.dtype} of shape "
                f"{tuple(seeds.shape)}"
            )
        return seeds.to(like.device)
    if not isinstance(seeds, list | tuple):
        raise TypeError(f"seeds: expected a list or a tensor, got {type(seeds).__name__}")
    if len(seeds) != count:
        raise ValueError(
            f"seeds: expected {count} elements, one for each of weights, got {len(seeds)}"
        )
    return torch.stack([seed_tensor(seed, like) for seed in seeds])


class _LearnedWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        count: int, seeds: Tensor | None, options: tuple[Any, ...], *tensors: Tensor
    ) -> Any:
        method, _, *rest = options
        weights, scores = list(tensors[:count]), list(tensors[count:])
        made, active = torch.ops.fastmask.learned_weights(weights, scores, seeds, method, *rest)
        return *made, *active

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count, seeds, ctx.options, *tensors = inputs
        # A layer that is not used has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[ctx.count :])
        ctx.save_for_backward(seeds, *tensors, *output[ctx.count :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seeds, *tensors = ctx.saved_tensors
        n, (method, tau, _, _, off, dtype, backend) = ctx.count, ctx.options
        weights, scores, active = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        wanted = ctx.needs_input_grad[3:]
        given = [weights[0].new_empty(0, dtype=dtype) if g is None else g for g in grads[:n]]
        of_either = [any(wanted[:n]), any(wanted[n:])]
        found = torch.ops.fastmask.learned_weights_grad(
            given, weights, scores, active, seeds, method, tau, off, of_either, backend
        )
        asked = (
            one if want and g is not None else None
            for one, want, g in zip(
                [*found[0], *found[1]], wanted, [*grads[:n], *grads[:n]], strict=True
            )
        )
        return None, None, None, *asked


def _forward(
    weights: list[Tensor],
    scores: list[Tensor],
    seeds: Tensor | None,
    method: str,
    mu: float,
    density: float | None,
    off: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    # The dtype that is computed in, to which weights are rounded first.
    module = _backend.resolve("learned_weights", backend, weights[0].device, dtype)
    return module.learned_weights(weights, scores, seeds, method, mu, density, off, dtype)


def _forward_fake(
    weights: list[Tensor],
    scores: list[Tensor],
    seeds: Tensor | None,
    method: str,
    mu: float,
    density: float | None,
    off: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    made = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    sizes = [packed_bytes(weight.numel()) for weight in weights]
    return made, [weights[0].new_empty(size, dtype=torch.uint8) for size in sizes]


def _backward(
    grads: list[Tensor],
    weights: list[Tensor],
    scores: list[Tensor],
    active: list[Tensor],
    seeds: Tensor | None,
    method: str,
    tau: float,
    off: str,
    output_mask: list[bool],
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    module = _backend.resolve("learned_weights", backend, weights[0].device, grads[0].dtype)
    return module.learned_weights_grad(
        grads, weights, scores, active, seeds, method, tau, off, output_mask
    )


def _backward_fake(
    grads: list[Tensor], weights: list[Tensor], scores: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    output_mask = rest[-2]
    of_weights, of_scores = (
        [
            torch.empty_like(one) if wish and g.shape == one.shape else one.new_empty(0)
            for g, one in zip(grads, many, strict=True)
        ]
        for wish, many in zip(output_mask, (weights, scores), strict=True)
    )
    return of_weights, of_scores


register(
    "learned_weights(Tensor[] weights, Tensor[] scores, Tensor? seeds, str method, float mu, "
    "float? density, str off, ScalarType dtype, str backend) -> (Tensor[], Tensor[])",
    _forward,
    _forward_fake,
)
register(
    "learned_weights_grad(Tensor[] grads, Tensor[] weights, Tensor[] scores, Tensor[] active, "
    "Tensor? seeds, str method, float tau, str off, bool[2] output_mask, str backend) "
    "-> (Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)
