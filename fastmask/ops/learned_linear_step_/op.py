"""learned_linear_step_: the step of a learned mask's scores, taken where their gradient is computed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks, _lists
from fastmask.ops._register import register
from fastmask.ops.learned_linear.op import check_method, check_off
from fastmask.ops.masked_sgd_.op import sgd_numbers
from fastmask.ops.sample_mask.op import seed_tensor


def learned_linear_step_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    momenta: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    method: Literal["gumbel", "threshold", "topk"] = "gumbel",
    seed: int | Tensor | None = None,
    tau: float = 1.0,
    off: Literal["zero", "flip"] = "zero",
    scale: Literal["rsqrt_density"] | None = None,
    groups: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Step scores along the gradient that `learned_linear` gives them: `masked_sgd_` with `dL/dscores`.

    The gradient is that of the scores as they are before the step. Where it is summed it is used, so that
    no tensor holds it; on the CPU, for scores that are not float32, one does in between.
    `fastmask.optim.step_in_backward` makes every backward of a learned layer do this.

    Args:
        grad: gradient dY of `learned_linear`'s output, floating (B, N).
        x: its rows (B, K), dtype of grad.
        weight: (N, K), dtype of grad.
        scores: logits or scores, floating (N, K), updated.
        active: the bits that the forward used, (S, bytes) uint8: of `sample_mask(scores, seed, S)`, say.
        momenta: like scores, updated; None where momentum is 0.
        lr: number, or floating tensor of 1 element.
        momentum, weight_decay, dampening, nesterov, maximize, first: as for `masked_sgd_`.
        method, tau, off, scale, groups: those of the forward.
        seed: gumbel: that of the forward, a whole number or a 0-d int64 tensor.
        backend: `auto` or the name of a back end.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit; S does not divide B; a number is not
            finite; an option is out of its range or belongs to another method; no seed for gumbel.
        BackendUnavailable: the back end named cannot run.

    Gradients: none; scores may require grad.
    Deterministic: yes. On `reference` and, in float32, on `cpu` scores and momenta have the bits of that back
        end's gradient followed by torch.optim.SGD's for-loop; `triton` keeps the error budget.
    Source: arXiv 2308.13957, 5.3; torch.optim.SGD.
    """
    for name, value in (("grad", grad), ("x", x), ("weight", weight), ("scores", scores)):
        _checks.floating(name, value)
        _checks.same(name, value, "grad", grad, dtype=name != "scores")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (N, K), got {tuple(weight.shape)}")
    N, K = weight.shape
    rows = len(grad) if grad.dim() else 0
    _checks.shape("grad", grad, (rows, N), "a row of N for each of x")
    _checks.shape("x", x, (rows, K), "a row of K for each of grad")
    _checks.shape("scores", scores, weight.shape, "that of weight")
    _lists.writable("scores", [scores])
    _checks.packed("active", active, weight.numel(), "weight", weight)
    active = active if active.dim() == 2 else active.unsqueeze(0)
    samples = len(active)
    _checks.rows(x, samples, groups, "active")
    # The density of top-k decided the bits, which are given.
    density = 0.5 if method == "topk" else None
    many = samples if method == "gumbel" else 1
    tau, _ = check_method(method, seed, many, tau, 0.0, density)
    if many != samples:
        raise ValueError(f"active: expected one mask with method={method!r}, got {samples}")
    if method == "gumbel" and seed is None:
        raise ValueError("seed: expected the seed of the forward with method='gumbel', got None")
    numbers = sgd_numbers(momentum, weight_decay, dampening, nesterov, maximize, first)
    if momentum != 0:
        held = [] if momenta is None else [momenta]
        _lists.alike("momenta", held, [scores])
        _lists.writable("momenta", held)
    with torch.no_grad():
        torch.ops.fastmask.learned_linear_step_(
            grad, x, weight, scores, active, momenta if momentum != 0 else None, groups,
            None if seed is None else seed_tensor(seed, scores), method, tau, off,
            check_off(off, scale), _lists.number_or_tensor("lr", lr), *numbers, backend,
        )  # fmt: skip


def _implementation(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    active: Tensor,
    momenta: Tensor | None,
    groups: Tensor | None,
    *options_and_backend: Any,
) -> None:
    *options, backend = options_and_backend
    _checks.in_range(groups, len(active))
    module = _backend.resolve("learned_linear_step_", backend, grad.device, grad.dtype)
    module.learned_linear_step_(grad, x, weight, scores, active, momenta, groups, *options)


def _fake(*_: object) -> None:
    return None


register(
    "learned_linear_step_(Tensor grad, Tensor x, Tensor weight, Tensor(a!) scores, Tensor active, "
    "Tensor(b!)? momenta, Tensor? groups, Tensor? seed, str method, float tau, str off, bool rescale, "
    "Tensor lr, float momentum, float weight_decay, float dampening, bool nesterov, bool maximize, "
    "bool first, str backend) -> ()",
    _implementation,
    _fake,
)
