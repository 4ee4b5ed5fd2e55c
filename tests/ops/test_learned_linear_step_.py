"""learned_linear_step_: the gradient of learned_linear and then SGD's step, whatever the scores are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from promises import under_test, unusable
from surrogate import SEED, VARIANTS, bits_of, name_of
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

RULES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
]


def operands(n: int, k: int, b: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """dY, x, weight, and scores in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [values(b, n, seed=4), values(b, k), values(n, k, seed=1), values(n, k, seed=2)]
    return [t.to(dtype) for t in tensors[:3]] + [tensors[3].to(wide)]


def active_of(scores: Tensor, **options: Any) -> Tensor:
    """The packed bits of the forward."""
    ones = bits_of(scores.float(), **options)
    return torch.stack([ops.pack(one) for one in ones])


def options_of(variant: dict[str, Any]) -> dict[str, Any]:
    """What the step is told of a forward: not what decided its bits."""
    return {k: v for k, v in variant.items() if k not in ("samples", "mu", "density")}


def plain(tensors: list[Tensor], backend: str = "auto", **variant: Any) -> Tensor:
    """The gradient of the scores, of the op that is proved elsewhere."""
    dy, x, w, scores = tensors
    leaf = scores.detach().requires_grad_()
    y = ops.learned_linear(x, w, leaf, backend=backend, **variant)
    return torch.autograd.grad(y, leaf, dy)[0]


def sgd(scores: Tensor, grads: list[Tensor], **rule: Any) -> list[Tensor]:
    """Scores and momentum (if any) after torch's for-loop."""
    theta = scores.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1, foreach=False, **rule)
    for grad in grads:
        theta.grad = grad
        optimizer.step()
    held = optimizer.state[theta].get("momentum_buffer")
    return [theta.detach()] + ([] if held is None else [held])


def stepped(tensors: list[Tensor], active: Tensor, steps: int = 2, **options: Any) -> list[Tensor]:
    """Scores and momentum (if any) after the op, `active` being the bits of every step."""
    dy, x, w, scores = tensors
    theta = scores.clone()
    held = torch.full_like(theta, float("nan")) if options.get("momentum") else None
    for i in range(steps):
        ops.learned_linear_step_(dy, x, w, theta, active, held, lr=0.1, first=i == 0, **options)
    return [theta] if held is None else [theta, held]


def gradient(tensors: list[Tensor], theta: Tensor, active: Tensor, **variant: Any) -> Tensor:
    """dL/dscores at theta under bits that are given, by the registered op."""
    dy, x, w, _ = tensors
    seed = variant.get("seed")
    return torch.ops.fastmask.learned_linear_grad(
        dy, x, w, theta, active, variant.get("groups"), None if seed is None else torch.tensor(seed),
        variant["method"], variant.get("tau", 1.0), variant.get("off", "zero"), "scale" in variant,
        [False, False, True, False], variant.get("backend", "auto"),
    )[2]  # fmt: skip


def test_by_hand() -> None:
    x, dy = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]).T.contiguous()
    w = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    scores = torch.tensor([[0.5, -1.0], [0.0, 0.25]])
    held = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    active = ops.pack(scores, 0.0)
    # G W: 1 x 1 x 1, 1 x 2 x 10; 3 x 1 x 2, 3 x 2 x 20.
    ops.learned_linear_step_(dy, x, w, scores, active, lr=0.5, method="threshold")
    assert scores.tolist() == [[0.0, -11.0], [-3.0, -59.75]]
    ops.learned_linear_step_(
        dy, x, w, scores, active, held, lr=torch.tensor(0.5), momentum=0.5, method="threshold"
    )
    assert held.tolist() == [[1.5, 20.5], [6.0, 120.0]]
    assert scores.tolist() == [[-0.75, -21.25], [-6.0, -119.75]]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_gradient_and_then_torchs_step(variant: dict[str, Any], rule: dict[str, Any]) -> None:
    """The bits of both one after the other, or within the budget of the two."""
    for n, k in ADVERSARIAL_SHAPES if rule == RULES[3] else [(3, 8), (37, 45)]:
        tensors = operands(n, k)
        active = active_of(tensors[3], **variant)
        with poisoned_memory():
            got = stepped(tensors, active, **options_of(variant), **rule)
        assert len(got) == 1 + ("momentum" in rule)
        chains = []
        for kind in (torch.float32, torch.float64):
            same = [t.to(kind) for t in tensors]
            first = gradient(same, same[3], active, **variant)
            after = sgd(same[3], [first], **rule)[0]
            chains.append(sgd(same[3], [first, gradient(same, after, active, **variant)], **rule))
        for mine, torchs, exact in zip(got, *chains, strict=True):
            if under_test() in ("reference", "cpu"):
                assert_same_bits(mine, torchs)
            else:
                assert_within_budget(mine, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS[:4], ids=name_of)
def test_layers_of_other_dtypes(variant: dict[str, Any], dtype: torch.dtype) -> None:
    rule = {"momentum": 0.9, "weight_decay": 0.1}
    tensors = operands(37, 45, dtype=dtype)
    active = active_of(tensors[3], **variant)
    got = stepped(tensors, active, steps=1, **options_of(variant), **rule)
    wide = [t.double() for t in tensors]
    exact = sgd(wide[3], [gradient(wide, wide[3], active, **variant)], **rule)
    like = gradient(tensors, tensors[3], active, **variant, backend="reference")
    for mine, torchs, true in zip(got, sgd(tensors[3], [like], **rule), exact, strict=True):
        assert_within_budget(mine, torchs, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_other_dtypes(dtype: torch.dtype) -> None:
    for variant in VARIANTS[:3]:
        *tensors, scores = operands(37, 45)
        low = [*tensors, scores.to(dtype)]
        active = active_of(low[3], **variant)
        got = stepped(low, active, steps=1, momentum=0.9, **options_of(variant))
        wide = [t.double() for t in low]
        exact = sgd(wide[3], [gradient(wide, wide[3], active, **variant)], momentum=0.9)
        like = gradient(low, low[3], active, **variant, backend="reference")
        for mine, torchs, true in zip(got, sgd(low[3], [like], momentum=0.9), exact, strict=True):
            assert mine.dtype == dtype
            assert_within_budget(mine, torchs, true)


def test_groups_name_the_sample_of_each_row() -> None:
    tensors = operands(37, 45, b=8)
    variant: dict[str, Any] = {"method": "gumbel", "seed": SEED, "tau": 0.7}
    active = active_of(tensors[3], **variant, samples=3)
    for groups in (torch.tensor([2, 0, 1, 1, 2, 0, 0, 2]), torch.zeros(8, dtype=torch.int64)):
        got = stepped(tensors, active, steps=1, groups=groups, momentum=0.9, **variant)
        chains = [
            sgd(t[3], [gradient(t, t[3], active, groups=groups, **variant)], momentum=0.9)
            for t in (tensors, [t.double() for t in tensors])
        ]
        for mine, torchs, exact in zip(got, *chains, strict=True):
            assert_within_budget(mine, torchs, exact)


def test_memory_layout_does_not_matter() -> None:
    tensors = operands(37, 45)
    variant: dict[str, Any] = {"method": "gumbel", "seed": SEED, "momentum": 0.9, "lr": 0.1}
    active = active_of(tensors[3], method="gumbel", seed=SEED, samples=2)
    results = []
    for strange in (False, True):
        dy, x, w, scores = (non_contiguous(t) if strange else t.clone() for t in tensors)
        held = values(45, 37, seed=8).T if strange else values(45, 37, seed=8).T.contiguous()
        before = scores._version, held._version
        ops.learned_linear_step_(dy, x, w, scores, active, held, **variant)
        assert scores._version > before[0] and held._version > before[1]
        results.append((scores.contiguous(), held.contiguous()))
    for one, other in zip(*results, strict=True):
        # Strides choose the product's order of summation in the reference, and nothing else: 6 terms.
        torch.testing.assert_close(one, other, rtol=0, atol=6 * 2**-22 * float(other.abs().max()))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 5)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    """No rows, no gradient: weight decay and momentum act all the same, as torch has it for zeros."""
    tensors = operands(*shape, b=0)
    active = active_of(tensors[3], method="threshold")
    rule = {"momentum": 0.9, "weight_decay": 0.1}
    got = stepped(tensors, active, method="threshold", **rule)
    zero = torch.zeros(shape)
    for mine, torchs in zip(got, sgd(tensors[3], [zero, zero], **rule), strict=True):
        assert_within_budget(mine, torchs, torchs.double())


def test_a_weight_that_is_no_number_spoils_its_own_score_alone() -> None:
    dy, x, w, scores = operands(7, 64)
    spoilt = w.clone()
    spoilt[2, 5] = float("nan")
    active = active_of(scores, method="threshold")
    got, clean = (
        stepped([dy, x, weight, scores], active, method="threshold", momentum=0.9)
        for weight in (spoilt, w)
    )
    for mine, other in zip(got, clean, strict=True):
        assert mine.isnan().nonzero().tolist() == [[2, 5]]
        kept = ~mine.isnan()
        assert_same_bits(mine[kept], other[kept])


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
def test_opcheck(rule: dict[str, Any]) -> None:
    dy, x, w, scores = operands(7, 9)
    groups, held = torch.tensor([0, 1, 0, 1, 1, 1]), torch.zeros(7, 9) if rule else None
    active = active_of(scores, method="gumbel", seed=7, samples=2)
    numbers = (rule.get("momentum", 0.0), 0.1, 0.0, bool(rule), False, False)
    for how in (("zero", False), ("flip", False), ("zero", True)):
        opcheck(
            torch.ops.fastmask.learned_linear_step_,
            (dy, x, w, scores.clone(), active, held, groups, torch.tensor(7), "gumbel", 0.5, *how,
             torch.tensor(0.1), *numbers, "auto"),
        )  # fmt: skip


def test_what_it_refuses() -> None:
    tensors = operands(37, 45)
    active = active_of(tensors[3], method="gumbel", seed=1, samples=2)

    def refuse(kind: type[Exception], match: str, *args: Any, **options: Any) -> None:
        given = [*args, *[*tensors, active][len(args) :]]
        with pytest.raises(kind, match=match):
            ops.learned_linear_step_(*given, **{"lr": 0.1, "seed": 1, **options})

    dy, x, w, scores = tensors
    refuse(ValueError, r"grad: expected shape \(6, 37\)", dy[:, :-1])
    refuse(ValueError, r"x: expected shape \(6, 45\)", dy, x[:-1])
    refuse(TypeError, "weight: expected dtype torch.float32 like grad", dy, x, w.double())
    refuse(ValueError, r"weight: expected shape \(N, K\)", dy, x, w[0])
    refuse(ValueError, "scores: expected shape", dy, x, w, scores.T)
    refuse(TypeError, "scores: expected dtype float32", dy, x, w, scores.long())
    refuse(ValueError, "scores.*can be written", dy, x, w, scores[:, :1].expand(37, 45))
    refuse(TypeError, "active: expected packed bits", *tensors, active.long())
    refuse(ValueError, "active: expected one mask with", method="threshold", seed=None)
    refuse(ValueError, "seed: expected the seed of the forward", seed=None)
    refuse(ValueError, "seed: an option of method='gumbel'", *tensors, active[:1], method="topk")
    refuse(ValueError, "momenta: expected 1 elements", momentum=0.9)
    refuse(ValueError, r"momenta\[0\]: expected shape", *tensors, active, scores.T, momentum=0.9)
    refuse(ValueError, "nesterov: expected momentum > 0", nesterov=True)
    refuse(ValueError, "momentum: expected a finite number", momentum=float("inf"))
    refuse(ValueError, "lr: expected a finite number", lr=float("nan"))
    refuse(ValueError, "tau: expected a temperature", tau=1e-31)
    refuse(ValueError, "off: expected one of", off="sign")
    refuse(BackendUnavailable, f"back end '{unusable()}' cannot be used", backend=unusable())
