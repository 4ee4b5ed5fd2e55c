"""protect: hold frozen entries of any optimizer's parameters, bit for bit."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType, MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.optim.freezing import checked, clear_state


def protect(optimizer: torch.optim.Optimizer, frozen: Mapping[Tensor, BitMask]) -> Protection:
    """Keep the bits of frozen entries through every step: `theta = where(frozen, theta_before, theta)`.

    Works with any torch.optim.Optimizer, whatever its options, with closures, schedulers, GradScaler
    and gradient clipping. It stays in force until `remove()` or the end of its `with` block:

        protect(optimizer, {model.fc.weight: BitMask.from_bool(mask)})

    - Each step captures the frozen values as it starts and writes them back as it ends: a checkpoint
      loaded into the model between steps is kept. Until the step ends this takes one copy of each
      protected parameter.
    - Gradients are zeroed at frozen entries as they accumulate, so that clipping does not count them and
      a NaN there spoils nothing, and once more as the step starts, for those set by hand.
    - State of a parameter's shape (momentum, second moments) is zeroed at frozen entries now and
      whenever a state dict is loaded; Rprop's step lengths are left, ASGD's average holds the frozen
      values.
    - The optimizer's own checks and statistics see frozen entries as entries with gradient 0. Muon
      and Adafactor mix entries: the update of free ones is that of a matrix whose frozen entries have
      gradient 0. LBFGS keeps one flat history of all parameters: it is cleared, and starts anew, if it
      holds anything at a frozen entry. Rows that SparseAdam leaves out are no matter, but sparse
      gradients of a protected parameter are refused.
    - A step that raises leaves frozen entries as the optimizer left them; they are written back at the
      start of the next step, by `restore()`, by `remove()`, or at the end of the `with` block, unless
      the optimizer has loaded a state dict since, which is taken for a new start.
    - Protections add up: an entry frozen by any of two is frozen. Parameters added to the optimizer
      later are free until protected. Copies and pickles of an optimizer leave hooks behind, and with
      them the protection. What other code writes to a parameter between steps is not held: see
      `verify_frozen`. MaskedSGD and MaskedAdamW need no protection and no copy.

    Args:
        optimizer: the optimizer to hold.
        frozen: masks by parameter, 1 = frozen; a parameter left out is free.

    Returns:
        Protection, with `frozen`, `restore()` and `remove()`; also a context manager.

    Raises:
        TypeError, ValueError: no optimizer, or a differentiable one; no mapping; a key that the optimizer
            does not have; no BitMask; a mask of another shape or device. In the backward pass or the
            step: a sparse gradient.

    Source: arXiv 2308.13957, 3.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer: expected differentiable=False, got True: values are written back in place, and "
            "autograd cannot run through that"
        )
    return Protection(optimizer, checked(optimizer, frozen))


class Protection:
    """What `protect` returns: it holds frozen entries until it is removed."""

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: dict[Tensor, BitMask]) -> None:
        self._optimizer = optimizer
        self._frozen = frozen
        # Values as they were when the step in progress began, and the dict of that call's arguments.
        self._saved: dict[Tensor, Tensor] = {}
        self._call: dict[str, Any] | None = None
        clear_state(optimizer, frozen)
        _zero_gradients(frozen)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        for param, mask in frozen.items():
            self._handles.append(_on_gradient(param, partial(_zero_gradient, mask=mask)))

    @property
    def frozen(self) -> Mapping[Tensor, BitMask]:
        """The masks in force, 1 = frozen; empty once removed."""
        return MappingProxyType(self._frozen)

    def restore(self) -> None:
        """Write back the frozen values of a step that began and never ended; else do nothing."""
        launches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for param in self._saved:
            launches[param.device, param.dtype].append(param)
        for params in launches.values():
            ops.restore_frozen_(
                params,
                [self._saved[param] for param in params],
                [self._frozen[param].bits for param in params],
            )
        if not self._in_step():
            self._forget()

    def remove(self) -> None:
        """End the protection; what a step that raised has moved is written back first."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._frozen = {}
        self._forget()

    def __enter__(self) -> Protection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @torch.no_grad()
    def _before_step(self, _: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        # Not empty within the step of a derived class that calls this one, and after one that raised.
        if self._call is not None:
            self.restore()
        _zero_gradients(self._frozen)
        if self._call is None:
            self._saved = {param: param.detach().clone() for param in self._frozen}
            self._call = kwargs

    @torch.no_grad()
    def _after_step(self, _: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs is self._call:
            self._call = None
        self.restore()
        if isinstance(self._optimizer, torch.optim.ASGD):
            for param, mask in self._frozen.items():
                state = self._optimizer.state.get(param)
                if state:
                    ops.restore_frozen_([state["ax"]], [param.detach()], [mask.bits])

    def _in_step(self) -> bool:
        """Whether the call whose start was captured is still running, that is, on the stack."""
        if self._call is None:
            return False
        # Nothing less tells a step within a step from one that raised: torch calls no hook then, and the
        # traceback keeps the dead frame and all its objects.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_locals.get("kwargs") is not self._call:
            frame = frame.f_back
        return frame is not None

    def _forget(self) -> None:
        self._saved, self._call = {}, None

    def _after_load(self, _: torch.optim.Optimizer) -> None:
        self._forget()
        clear_state(self._optimizer, self._frozen)


def _on_gradient(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `hook` when a parameter's gradient has accumulated, also if it is to require one later."""
    required = param.requires_grad
    try:
        return param.requires_grad_().register_post_accumulate_grad_hook(hook)
    finally:
        param.requires_grad_(required)


def _zero_gradient(param: Tensor, mask: BitMask) -> None:
    _zero_gradients({param: mask})


@torch.no_grad()
def _zero_gradients(frozen: Mapping[Tensor, BitMask]) -> None:
    """Zero gradients at frozen entries, in place: others may hold them (DDP's buckets)."""
    launches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for param in frozen:
        grad = param.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise TypeError(
                f"protect: expected a dense gradient of the protected parameter of shape "
                f"{tuple(param.shape)}, got {grad.layout}"
            )
        launches[grad.device, grad.dtype].append(param)
    for params in launches.values():
        grads = [param.grad for param in params if param.grad is not None]
        # Nothing but frozen entries is read, so that one tensor's zeros serve all.
        zeros = grads[0].new_zeros(max(grad.numel() for grad in grads))
        ops.restore_frozen_(
            grads,
            [zeros[: grad.numel()].view(grad.shape) for grad in grads],
            [frozen[param].bits for param in params],
        )
