"""What benchmarks of optimizers share: a network's tensors, partly frozen, and the rivals' steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask import ops
from fastmask._benchmarks import timing
from fastmask.testing import assert_same_bits, assert_within_budget

SHARES = (0.0, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Network:
    """Parameters with gradients, and what is frozen of them, as bools and as bits."""

    params: list[Tensor]
    frozen: list[Tensor]
    bits: list[Tensor]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients."""
        return [p.grad for p in self.params if p.grad is not None]


def network(
    sizes: Sequence[int], share: float, device: torch.device, dtype: torch.dtype
) -> Network:
    """Normal parameters with small gradients, this share of them frozen at random."""
    torch.manual_seed(0)
    params = [torch.randn(size, device=device).to(dtype) for size in sizes]
    for param in params:
        param.grad = (torch.randn(param.shape, device=device) * 1e-3).to(dtype)
    frozen = [torch.rand(size, device=device) < share for size in sizes]
    return Network(params, frozen, [ops.pack(one) for one in frozen])


Step = Callable[[list[Tensor], list[list[Tensor]], str], None]


def check(net: Network, states: Sequence[Sequence[Tensor]], step: Step, backend: str) -> None:
    """Two steps from the same start: frozen entries keep their bits, free ones the error budget.

    `step(params and gradients, states, backend)` is told its tensors; the exact step is the reference's in
    float64.
    """

    def after(name: str, kind: torch.dtype | None) -> list[Tensor]:
        params = [p.detach().to(kind or p.dtype, copy=True) for p in net.params]
        for new, old in zip(params, net.params, strict=True):
            assert old.grad is not None
            new.grad = old.grad.to(kind or old.dtype)
        held = [[t.to(kind or t.dtype, copy=True) for t in kept] for kept in states]
        for _ in range(2):
            step(params, held, name)
        return params

    got, plain, exact = (
        after(backend, None),
        after("reference", None),
        after("reference", torch.float64),
    )
    for i, held in enumerate(net.frozen):
        assert_same_bits(got[i], net.params[i], where=held)
        assert_within_budget(got[i][~held], plain[i][~held], exact[i][~held])


def rivals(
    net: Network, optimizer: Callable[..., torch.optim.Optimizer]
) -> dict[str, timing.Contestant]:
    """Masks on the gradients and a step, an exact freeze around a step, and the step alone.

    `optimizer(params, **options)` is torch's own; all share the parameters, each has its own state. Masked
    gradients are no freeze where momentum, weight decay or moments are not 0.
    """
    floats = [(~one).to(net.params[0].dtype) for one in net.frozen]
    bools = [~one for one in net.frozen]

    def masked(masks: list[Tensor], **options: bool) -> timing.Contestant:
        stepper = optimizer(net.params, **options)

        def once(_: int) -> None:
            if options:
                torch._foreach_mul_(net.grads, masks)
            else:
                for grad, keep in zip(net.grads, masks, strict=True):
                    grad *= keep
            stepper.step()

        return once

    def kept_aside() -> timing.Contestant:
        stepper = optimizer(net.params, fused=True)

        def once(_: int) -> None:
            saved = [p.clone() for p in net.params]
            stepper.step()
            for param, held, old in zip(net.params, net.frozen, saved, strict=True):
                param.copy_(torch.where(held, old, param))

        return once

    alone = optimizer(net.params, fused=True)
    return {
        "eager float": masked(floats),
        "eager bool": masked(bools),
        "best eager": masked(floats, fused=True),
        "save restore": kept_aside(),
        "dense": lambda i: alone.step(),
    }
