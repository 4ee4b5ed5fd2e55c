"""MaskedAdamW: torch.optim.AdamW with entries that cannot move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.optim.freezing import FrozenEntries, apart, refuse_differentiable


class MaskedAdamW(FrozenEntries, torch.optim.AdamW):
    """Step as torch.optim.AdamW, `theta -= lr * (wd * theta + m' / (sqrt(v') + eps))`, on free entries only.

    Frozen entries cannot move by construction: neither gradients (NaN included) nor weight decay nor
    moments reach them, and their moments stay 0. With nothing frozen parameters and state have the bits of
    torch's for-loop where the reference runs (float64 and float16 on the CPU, everything where the C++
    engine is missing); the engine, which float32 and bfloat16 on the CPU take, agrees within rounding:
    its square root is IEEE's and torch's is not. `foreach` and `fused` change no number: there is one
    pass over weight, gradient, moments and bits; `fused` and `capturable` keep the step count on the
    parameter's device, where it is not read. State dicts are torch's, both ways; masks do not travel in
    them: to resume, construct with the same `frozen`. Copies and pickles keep their masks. GradScaler
    unscales and skips steps as for an optimizer that is not fused. An entry that is freed late meets a
    count of steps it took no part in, so that its first step is up to `(1 - beta1) / sqrt(1 - beta2)`
    times lr.

    With `compact` the moments of a parameter that has frozen entries are 1-D, of its free entries in
    logical order: a tenth of the bytes at 90 % frozen (12.8 MiB for 128 of 16.8 M float32 entries), a
    count alone for a parameter all frozen; without a frozen entry they are torch's. The C++ engine steps
    on them as they lie, faster than on dense state where much is frozen. Elsewhere, and on tensors that
    are not contiguous, a step takes 1,048,576 entries at a time, copies their free ones (4.2 MiB in all
    at 90 % frozen, 33 with little frozen, float32), updates them and writes them back. The bits are those
    of dense state, save that the reference, in 16 bits on the CPU, rounds a tensor's last few entries
    otherwise. Such a state dict carries its masks, and loads into MaskedAdamW of any masks, compact or
    not. torch's own raises in its first step: load it into one that is not compact and take that one's.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate, a number or a tensor of 1 element (a compiled step recompiles for each new
            number, as torch's does, and follows a tensor).
        betas: two numbers; tensors are refused.
        eps, weight_decay, amsgrad, maximize, capturable: as for torch.
        foreach, fused: accepted; without effect on the numbers.
        differentiable: must be False.
        frozen: masks by parameter, 1 = frozen; a parameter left out is free.
        compact: hold moments of free entries alone; masks are copied.

    Raises:
        TypeError, ValueError: an option torch refuses; `differentiable`; betas that are tensors; masks
            that do not fit. In `step`: gradients that are sparse, complex, or of another dtype than their
            parameter.
        RuntimeError: a CUDA graph captures a step without `capturable`.

    Source: arXiv 2308.13957, 3 (frozen entries); torch.optim.AdamW (free ones).
    """

    _op = "masked_adamw_"
    _moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        frozen: Mapping[Tensor, BitMask] | None = None,
        compact: bool = False,
    ) -> None:
        refuse_differentiable(differentiable)
        if any(isinstance(beta, Tensor) for beta in betas):
            raise TypeError("betas: expected two numbers, got a tensor")
        self._compact, self._frozen, self._free = compact, {}, {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
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
            gathered = [self._gathered(param) for param in params]
            for alike in apart(params, gathered):
                self._update(group, alike)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        on_device = bool(group["capturable"] or group["fused"])
        if params[0].is_cuda and not on_device and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "capturable: expected True, got False: a CUDA graph is capturing this step, and would "
                "replay it with the step count of now"
            )
        grads = [param.grad for param in params if param.grad is not None]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state.update(self._state(param, on_device, group["amsgrad"]))
        kept = self._moments if group["amsgrad"] else self._moments[:2]
        step = partial(
            ops.masked_adamw_,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
        if self._gathered(params[0]):
            for param, grad, state in zip(params, grads, states, strict=True):
                held = [state[key] for key in kept]
                for weight, slope, parts, is_last in self._free[param].pieces(param, grad, held):
                    m, v, *largest = ([part] for part in parts)
                    # All pieces take the same step; the last one counts it.
                    count = state["step"] if is_last else state["step"].clone()
                    step([weight], [slope], m, v, largest[0] if largest else None, [count], None)
        else:
            m, v, *largest = ([state[key] for state in states] for key in kept)
            counts = [state["step"] for state in states]
            bits = self._bits(params)
            step(params, grads, m, v, largest[0] if largest else None, counts, bits)

    def _state(self, param: Tensor, on_device: bool, amsgrad: bool) -> dict[str, Tensor]:
        """The state of a parameter, as torch makes it at the first step."""
        wide = not on_device and torch.get_default_dtype() == torch.float64
        free = self._free.get(param)
        made = {
            "step": torch.zeros(
                (),
                dtype=torch.float64 if wide else torch.float32,
                device=param.device if on_device else "cpu",
            )
        }
        for key in self._moments if amsgrad else self._moments[:2]:
            made[key] = torch.zeros_like(param) if free is None else param.new_zeros(free.count)
        return made
