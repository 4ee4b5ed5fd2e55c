"""MaskedSGD: torch.optim.SGD with entries that cannot move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.optim.freezing import FrozenEntries, apart, refuse_differentiable


class MaskedSGD(FrozenEntries, torch.optim.SGD):
    """Step as torch.optim.SGD, `theta -= lr * d`, on free entries; frozen ones keep their bits.

    Frozen entries cannot move by construction: neither gradients (NaN included) nor weight decay nor
    momentum reach them, and their momentum stays 0. With nothing frozen parameters and state have, on
    the CPU, the bits of torch's for-loop, save in bfloat16 on the C++ engine, which rounds once a step.
    `foreach` and `fused` are accepted and change nothing: there is one pass over weight, gradient,
    momentum and bits. State dicts are torch's, both ways; masks do
    not travel in them: to resume, construct with the same `frozen`. Copies and pickles keep their
    masks. GradScaler unscales and skips steps as for an optimizer that is not fused.

    With `compact` the momentum of a parameter that has frozen entries is 1-D, of its free entries in
    logical order: a tenth of the bytes at 90 % frozen, none for a parameter all frozen; without a frozen
    entry it is torch's. The C++ engine steps on it as it lies, faster than on dense state where much is
    frozen. Elsewhere, and on tensors that are not contiguous, a step takes 1,048,576 entries at a time,
    copies their free ones (4.2 MiB in all at 90 % frozen, 33 with little frozen, float32), updates them
    and writes them back. The bits are those of dense state, save that the reference, in 16 bits on the
    CPU, rounds a tensor's last few entries otherwise. Such a state dict carries its masks, and loads into
    MaskedSGD of any masks, compact or not. torch's own raises in its first step: load it into one that is
    not compact and take that one's.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate, a number or a tensor of 1 element (a compiled step recompiles for each new
            number, as torch's does, and follows a tensor).
        momentum, dampening, weight_decay, nesterov, maximize: as for torch.
        foreach, fused: accepted; without effect.
        differentiable: must be False.
        frozen: masks by parameter, 1 = frozen; a parameter left out is free.
        compact: hold momentum of free entries alone; masks are copied.

    Raises:
        TypeError, ValueError: an option torch refuses; `differentiable`; masks that do not fit. In
            `step`: gradients that are sparse, complex, or of another dtype than their parameter.

    Source: arXiv 2308.13957, 3 (frozen entries); torch.optim.SGD (free ones).
    """

    _op = "masked_sgd_"
    _moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        frozen: Mapping[Tensor, BitMask] | None = None,
        compact: bool = False,
    ) -> None:
        refuse_differentiable(differentiable)
        self._compact, self._frozen, self._free = compact, {}, {}
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        # fused makes torch's own take GradScaler's scale in its kernel; this one lets the scaler unscale.
        self._step_supports_amp_scaling = False
        self.set_frozen(frozen)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; return the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            momentum = group["momentum"] != 0
            new = [momentum and self.state[p].get("momentum_buffer") is None for p in params]
            gathered = [momentum and self._gathered(param) for param in params]
            for alike in apart(params, new, gathered):
                self._update(group, alike)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        states = [self.state[param] for param in params] if group["momentum"] != 0 else []
        first = len(states) > 0 and states[0].get("momentum_buffer") is None
        momenta = [
            self._empty(param, grad) if first else state["momentum_buffer"]
            for param, grad, state in zip(params, grads, states, strict=False)
        ]
        step = partial(
            ops.masked_sgd_,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=float(group["weight_decay"]),
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=first,
        )
        if momenta and self._gathered(params[0]):
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                for weight, slope, bufs, _ in self._free[param].pieces(
                    param, grad, momenta[i : i + 1]
                ):
                    step([weight], [slope], bufs, None)
        else:
            step(params, grads, momenta or None, self._bits(params))
        # Only now: a step that raises leaves no momentum that was never written.
        if first:
            for state, buf in zip(states, momenta, strict=True):
                state["momentum_buffer"] = buf

    def _empty(self, param: Tensor, grad: Tensor) -> Tensor:
        free = self._free.get(param)
        return torch.empty_like(grad) if free is None else grad.new_empty(free.count)
