"""learned_linear: a linear layer whose mask is learned through its scores, straight-through."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask import _backend
from fastmask.ops import _checks, _eager, _stepping
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register
from fastmask.ops.masked_linear.op import linear_operands, linear_shapes
from fastmask.ops.sample_mask.op import seed_tensor

METHODS = ("gumbel", "threshold", "topk")
# Within these bounds (score + n) / tau and the slope, at most 1 / (4 tau), are finite in float32.
TAU_LIMITS = (1e-30, 1e30)


def learned_linear(
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
    groups: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `x @ (a * where(b, weight, off)).T + bias` with bits b that scores decide and gradients reach.

    gumbel: `b = sample_mask(scores, seed, samples)`, `P(b = 1) = sigmoid(score)`. The rows of x (its
    leading dimensions, flattened) are S equal consecutive groups, each under a mask of its own, or
    `groups` names each row's sample. threshold: `b = scores > mu`. topk: `b = topk_mask(scores, density)`.
    `off` is what an inactive weight is read as: 0 (selected, also where it is NaN or infinite) or its
    negative. `a` is 1, or with `scale="rsqrt_density"` `rsqrt(mean(b))` of the sample's bits over the
    whole weight; a mask with no ones gives the bias alone.

    Args:
        x: floating (..., K), B rows in all.
        weight: (N, K), dtype of x.
        scores: logits or scores, floating (N, K); keep them float32, whatever the weight is.
        method: `gumbel`, `threshold` or `topk`. An option of another method is refused.
        seed: gumbel: whole number in [0, 2**64), a 0-d int64 tensor, or None for `draw_seed`.
        samples: gumbel: number S of masks; sample i is the same whatever S is.
        tau: gumbel: temperature, in [1e-30, 1e30]; it changes the gradient, not the bits.
        mu: threshold: scores above it are active.
        density: topk: share of active weights, in [0, 1].
        off: `zero` or `flip`.
        scale: None or `rsqrt_density`.
        bias: (N,), dtype of x, or None.
        groups: int64 of x's leading shape, sample index in [0, S) of each row, or None.
        backend: `auto` or the name of a back end.

    Returns:
        (..., N), dtype of x.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; S does not divide B; an option is out of
            its range or belongs to another method; `scale` with `off="flip"`.
        BackendUnavailable: the back end named cannot run.

    Gradients: x; weight, `a * where(b, G, 0 or -G)` with G = dY.T @ x of a sample's rows; bias; scores, in
        their own dtype and for all entries, inactive ones too: `sum over samples of dL/db * slope` with
        `dL/db = a * G * (weight - off) - a**2 / (2 N K) * sum(G * W')`, the second term being the gradient
        through a. slope is `s * (1 - s) / tau` of the sampled `s = sigmoid((score + n) / tau)` for gumbel,
        its noise drawn again from the seed, and 1 for the others. A mask with no ones is scaled as if it
        had one, so that its scores can recover. A weight that is NaN or infinite gives its own score such
        a gradient, and no other. Once differentiable.
    Deterministic: given the seed. Autocast: as `torch.nn.functional.linear`; scores keep their dtype.
    Source: arXiv 2308.13957, 5.3 (gumbel); arXiv 2409.07577, Eq. 1 (threshold, topk, flip, scale).
    """
    linear_shapes(x, weight)
    checked = learned_options(weight, scores, method, seed, samples, tau, mu, density, off, scale)
    _checks.rows(x, samples, groups, "samples")
    x, weight, bias = linear_operands(x, weight, bias)
    given = (t for t in (x, weight, scores, bias, groups) if t is not None)
    unwatched = _eager.unwatched() and all(map(_eager.ordinary, given))
    # Only sampled bits take a seed: the others must not advance torch's generator.
    key = seed_tensor(seed, scores) if method == "gumbel" else None
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    flat_groups = None if groups is None else groups.reshape(-1)
    step = _stepping.step_of(scores, x.dtype)
    options = (*checked, backend)
    function = _Undispatched if unwatched else _LearnedLinear
    out = function.apply(rows, weight, scores, bias, flat_groups, key, options, step)[0]
    return out.view(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else out


def learned_options(
    weight: Tensor,
    scores: Tensor,
    method: str,
    seed: int | Tensor | None,
    samples: int,
    tau: float,
    mu: float,
    density: float | None,
    off: str,
    scale: str | None,
) -> tuple[str, int, float, float, float | None, str, bool]:
    """Check scores and options; return method, samples, tau, mu, density, off, whether to rescale."""
    _checks.floating("scores", scores)
    _checks.shape("scores", scores, weight.shape, "that of weight")
    _checks.same("scores", scores, "weight", weight, dtype=False)
    tau, density = check_method(method, seed, samples, tau, mu, density)
    return method, samples, tau, float(mu), density, off, check_off(off, scale)


def check_method(
    method: str,
    seed: int | Tensor | None,
    samples: int,
    tau: float,
    mu: float,
    density: float | None,
) -> tuple[float, float | None]:
    """Return tau and density; raise where an option is out of range or belongs to another method."""
    _checks.one_of("method", method, METHODS)
    _checks.count("samples", samples)
    _checks.finite("mu", mu)
    tau = temperature(tau)
    given = {
        "seed": ("gumbel", seed is not None),
        "samples": ("gumbel", samples != 1),
        "tau": ("gumbel", tau != 1.0),
        "mu": ("threshold", mu != 0.0),
        "density": ("topk", density is not None),
    }
    for option, (owner, is_given) in given.items():
        if is_given and owner != method:
            raise ValueError(f"{option}: an option of method={owner!r}, got it with {method!r}")
    if method != "topk":
        return tau, None
    if density is None:
        raise ValueError("density: method='topk' needs the share of active weights, got None")
    return tau, _checks.share("density", density)


def temperature(tau: float) -> float:
    """Return a temperature within TAU_LIMITS, or raise."""
    tau = _checks.finite("tau", tau, positive=True)
    low, high = TAU_LIMITS
    if not low <= tau <= high:
        raise ValueError(f"tau: expected a temperature in [{low:g}, {high:g}], got {tau:g}")
    return tau


def check_off(off: str, scale: str | None) -> bool:
    """Return whether to scale by rsqrt(density), or raise."""
    _checks.one_of("off", off, ("zero", "flip"))
    _checks.one_of("scale", scale, (None, "rsqrt_density"))
    if scale is not None and off == "flip":
        raise ValueError(
            "scale: expected None with off='flip' (a flipped weight keeps its magnitude: there is no "
            f"density to make up for), got {scale!r}"
        )
    return scale is not None


class _LearnedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        groups: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
        step: _stepping.ScoreStep | None,
    ) -> tuple[Tensor, Tensor]:
        method, samples, _, *rest = options
        return torch.ops.fastmask.learned_linear(
            x, weight, scores, bias, groups, seed, method, samples, *rest
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, scores, _, groups, seed, ctx.options, ctx.step = inputs
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if ctx.step is not None:
            ctx.scores, ctx.version = scores, scores._version
        # The bits are kept: 1/32 of the scores' bytes, against drawing or sorting again.
        ctx.save_for_backward(x if needs_x else None, weight, scores, output[1], groups, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        steps = ctx.step is not None and wanted[2] and _steps(ctx)
        x, weight, scores, active, groups, seed = ctx.saved_tensors
        method, _, tau, _, _, off, rescale, backend = ctx.options
        wanted[2] = wanted[2] and not steps
        taught = (groups, seed, method, tau, off, rescale)
        unwatched = _eager.unwatched() and _eager.ordinary(grad)
        compute = _backward if unwatched else torch.ops.fastmask.learned_linear_grad
        grads = compute(grad, x, weight, scores, active, *taught, wanted, backend)
        if steps:
            _defer(ctx, (grad, x, weight, ctx.scores), active, taught, backend)
        asked = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *asked, None, None, None, None


def _steps(ctx: Any) -> bool:
    """Whether this backward is to step the scores, rather than to return their gradient."""
    found: bool = ctx.step.wanted_by(ctx.next_functions[2][0], ctx.scores, ctx.version)
    return found


def _defer(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    active: Tensor,
    taught: tuple[Any, ...],
    backend: str,
) -> None:
    """Hand over how to step the scores themselves, which a saved tensor may be a copy of."""

    def gradient() -> Tensor:
        wanted = [False, False, True, False]
        call = torch.ops.fastmask.learned_linear_grad
        return call(*tensors, active, *taught, wanted, backend)[2]

    def step(momenta: Tensor | None, *numbers: Any) -> None:
        call = torch.ops.fastmask.learned_linear_step_
        call(*tensors, active, momenta, *taught, *numbers, backend)

    node = ctx.next_functions[2][0]
    ctx.step.defer(node, ctx.scores, _stepping.Deferred(gradient, step))


class _Undispatched(torch.autograd.Function):
    """The same past torch's dispatcher: a step of 7 x 512 weights takes 160 us instead of 245 (Zen 4)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, scores, bias, groups, seed, (method, samples, _, *rest), _ = inputs
        output = _forward(x, weight, scores, bias, groups, seed, method, samples, *rest)
        ctx.set_materialize_grads(False)
        _LearnedLinear.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _LearnedLinear.backward(ctx, *grads)


def _forward(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    samples: int,
    mu: float,
    density: float | None,
    off: str,
    rescale: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _checks.in_range(groups, samples)
    module = _backend.resolve("learned_linear", backend, x.device, x.dtype)
    return module.learned_linear(
        x, weight, scores, bias, groups, seed, method, samples, mu, density, off, rescale
    )


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    samples: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    active = x.new_empty((samples, packed_bytes(weight.numel())), dtype=torch.uint8)
    return x.new_empty(x.shape[0], weight.shape[0]), active


def _backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    groups: Tensor | None,
    seed: Tensor | None,
    method: str,
    tau: float,
    off: str,
    rescale: bool,
    output_mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _backend.resolve("learned_linear", backend, grad.device, grad.dtype)
    return module.learned_linear_grad(
        grad, x, weight, scores, active, groups, seed, method, tau, off, rescale, output_mask
    )


def _backward_fake(
    grad: Tensor, x: Tensor | None, weight: Tensor, scores: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    of_x, of_weight, of_scores, of_bias = rest[-2]
    return (
        grad.new_empty((grad.shape[0], k) if of_x else 0),
        weight.new_empty((n, k) if of_weight else 0),
        scores.new_empty((n, k) if of_scores else 0),
        grad.new_empty(n if of_bias else 0),
    )


register(
    "learned_linear(Tensor x, Tensor weight, Tensor scores, Tensor? bias, Tensor? groups, "
    "Tensor? seed, str method, SymInt samples, float mu, float? density, str off, bool rescale, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "learned_linear_grad(Tensor grad, Tensor? x, Tensor weight, Tensor scores, Tensor active, "
    "Tensor? groups, Tensor? seed, str method, float tau, str off, bool rescale, "
    "bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
