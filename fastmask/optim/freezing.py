"""Which entries of an optimizer's parameters are frozen: checked, held, and kept out of its state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastmask.bits import BitMask
from fastmask.ops import _tables
from fastmask.optim.compact import FreeEntries, refit

# State of a parameter's shape that is no accumulated gradient: a count, a step length, an average of values.
_NO_GRADIENTS = frozenset({"step", "step_size", "ax"})


def names(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """What errors call each parameter: its name if the optimizer knows it, else its place."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        given = group.get("param_names")
        for i, param in enumerate(group["params"]):
            found[param] = given[i] if given else f"parameter {i} of group {g}"
    return found


def checked(
    optimizer: torch.optim.Optimizer, frozen: Mapping[Tensor, BitMask]
) -> dict[Tensor, BitMask]:
    """Return `frozen` as a dict; raise unless it maps parameters of the optimizer to masks of their own."""
    if not isinstance(frozen, Mapping):
        raise TypeError(
            f"frozen: expected a mapping of parameters to BitMasks, got {type(frozen).__name__}"
        )
    known = names(optimizer)
    for param, mask in frozen.items():
        if not isinstance(param, Tensor):
            raise TypeError(f"frozen: expected parameters as keys, got {type(param).__name__}")
        if param not in known:
            raise ValueError(
                f"frozen: a parameter of shape {tuple(param.shape)} is not in the optimizer"
            )
        name = known[param]
        if not isinstance(mask, BitMask):
            raise TypeError(
                f"frozen: expected a BitMask (see BitMask.from_bool) for {name}, got {type(mask).__name__}"
            )
        if hasattr(param, "placements"):
            raise TypeError(
                f"frozen: {name} is sharded (DTensor); freezing shards is not supported"
            )
        if not param.is_floating_point():
            raise TypeError(f"frozen: expected {name} to be real floating, got {param.dtype}")
        if mask.shape != param.shape:
            raise ValueError(
                f"frozen: expected a mask of shape {tuple(param.shape)} for {name}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.device != param.device:
            raise ValueError(
                f"frozen: expected a mask on {param.device} for {name}, got one on {mask.device}"
            )
    return dict(frozen)


def clear_state(optimizer: torch.optim.Optimizer, frozen: Mapping[Tensor, BitMask]) -> None:
    """Replace what an optimizer has accumulated at frozen entries by 0.

    The tensors are new ones: those loaded from a checkpoint may belong to the caller still.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        _clear_history(optimizer, frozen)
        return
    for param, mask in frozen.items():
        state = optimizer.state.get(param, {})
        free = optimizer._free.get(param) if isinstance(optimizer, FrozenEntries) else None
        shape = param.shape if free is None else torch.Size([free.count])
        stale = [
            key
            for key, value in state.items()
            if isinstance(value, Tensor)
            and key not in _NO_GRADIENTS
            and value.shape == shape
            and value.is_floating_point()
        ]
        if stale:
            ones = mask.to_bool() if free is None else free.gather(mask.to_bool())
            for key in stale:
                state[key] = state[key].detach().masked_fill(ones, 0)


def _clear_history(optimizer: torch.optim.LBFGS, frozen: Mapping[Tensor, BitMask]) -> None:
    """Forget LBFGS's history where it holds anything at a frozen entry.

    The history is flat, over all parameters in order, and its curvatures are sums over entries: zeroing
    entries would leave curvatures that belong to no step.
    """
    params = optimizer.param_groups[0]["params"]
    state = optimizer.state.get(params[0], {})
    parts = []
    for param in params:
        width = 2 * param.numel() if param.is_complex() else param.numel()
        mask = frozen.get(param)
        ones = torch.zeros(width, dtype=torch.bool, device=param.device)
        parts.append(ones if mask is None else mask.to_bool().flatten())
    ones = torch.cat(parts)
    for key in ("d", "prev_flat_grad", "old_dirs", "old_stps"):
        held = state.get(key)
        for vector in held if isinstance(held, list) else [held]:
            if vector is not None and vector[ones].any():
                state.clear()
                return


def apart(params: list[Tensor], *said: list[bool]) -> list[list[Tensor]]:
    """Parameters by device, dtype and what is said of each: those that one call takes together."""
    told: list[list[Any]] = [[p.dtype for p in params], [p.device for p in params], *said]
    if all(column == column[:1] * len(column) for column in told):
        return [params] if params else []
    found = defaultdict(list)
    for param, key in zip(params, zip(*told, strict=True), strict=True):
        found[key].append(param)
    return list(found.values())


class FrozenEntries(torch.optim.Optimizer):
    """The part that masked optimizers share: masks by parameter, and the layout of their state."""

    # The op of a step, and the keys of state that holds one value an entry.
    _op: str
    _moments: tuple[str, ...]
    _compact: bool
    _frozen: dict[Tensor, BitMask]
    # Parameters whose state is compact: those with a frozen entry, where compact is asked for.
    _free: dict[Tensor, FreeEntries]

    @property
    def frozen(self) -> Mapping[Tensor, BitMask]:
        """The masks now in force, 1 = frozen; parameters without one are free."""
        return MappingProxyType(self._frozen)

    def set_frozen(self, frozen: Mapping[Tensor, BitMask] | None) -> None:
        """Put these masks in the place of all earlier ones and forget state at their frozen entries.

        Entries that stay free keep their state, entries that become free start with state 0. Compact
        state is laid out anew, by way of one dense tensor at a time.

        Args:
            frozen: masks by parameter, 1 = frozen; a parameter left out is free.

        Raises:
            TypeError, ValueError: no mapping, a key that the optimizer does not have, no BitMask, a mask of
                another shape or device, or for compact state one on meta; the masks in force stay.
        """
        masks = checked(self, {} if frozen is None else frozen)
        free = {}
        if self._compact:
            for param, mask in masks.items():
                if mask.device.type == "meta":
                    raise ValueError(
                        f"frozen: expected bits that compact=True can count for {names(self)[param]}, "
                        "got a mask on meta"
                    )
            # Compact state means nothing without its mask: no one else may write to that.
            masks = {param: mask.clone() for param, mask in masks.items()}
            free = {param: FreeEntries(mask) for param, mask in masks.items() if mask.count()}
        for param, state in self.state.items():
            for key in self._held(state):
                state[key] = refit(state[key], param, self._free.get(param), free.get(param))
        self._frozen, self._free = masks, free
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; compact state comes with its mask, packed bits under `frozen`."""
        found = super().state_dict()
        for key, param in self._keys(found):
            held = found["state"].get(key, {})
            if param in self._free and self._held(held):
                found["state"][key] = {**held, "frozen": self._frozen[param].bits}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same optimizer, torch's or a compact one of whatever masks.

        The masks in force stay: state at their frozen entries is dropped, or 0 where state is dense. An
        entry that was frozen when compact state was saved starts with state 0.

        Raises:
            ValueError: groups of other sizes; compact state, or state to be made compact, that does not
                fit its parameter.
        """
        super().load_state_dict(self._refitted(state_dict))
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        mine = {"_compact": self._compact, "_frozen": self._frozen, "_free": self._free}
        return {**super().__getstate__(), **mine}

    def _gathered(self, param: Tensor) -> bool:
        """Whether compact state is to be gathered: the CPU engine takes it as it is, of dense tensors."""
        if not self._free or param not in self._free or (grad := param.grad) is None:
            return False
        dense = param.is_contiguous() and grad.is_contiguous()
        return not dense or _tables.engine(self._op, "auto", param) is None

    def _clear(self) -> None:
        """Zero state at frozen entries; compact state has none there."""
        dense = {param: mask for param, mask in self._frozen.items() if param not in self._free}
        clear_state(self, dense)

    def _bits(self, params: list[Tensor]) -> list[Tensor | None]:
        masks = [self._frozen.get(param) for param in params]
        return [None if mask is None else mask.bits for mask in masks]

    def _held(self, state: dict[str, Any]) -> list[str]:
        """The keys of a parameter's state that hold one value an entry."""
        return [key for key in self._moments if state.get(key) is not None]

    def _keys(self, state_dict: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """What a state dict calls each parameter; torch, too, goes by order."""
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        return list(zip(keys, params, strict=False))

    def _refitted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict in the layout of this optimizer, made before torch moves it to the device."""
        known, states = names(self), dict(state_dict["state"])
        for key, param in self._keys(state_dict):
            held = dict(states.get(key, {}))
            bits, new = held.pop("frozen", None), self._free.get(param)
            if bits is None and new is None:
                continue
            old = None if bits is None else _saved(bits, param, known[param])
            shape = param.shape if old is None else torch.Size([old.count])
            for name in self._held(held):
                if held[name].shape != shape:
                    raise ValueError(
                        f"state_dict: expected {name} of shape {tuple(shape)} for {known[param]}, "
                        f"got {tuple(held[name].shape)}"
                    )
                held[name] = refit(held[name], param, old, new)
            states[key] = held
        return {**state_dict, "state": states}


def _saved(bits: Tensor, param: Tensor, name: str) -> FreeEntries:
    """The free entries that a state dict was saved with."""
    try:
        return FreeEntries(BitMask(bits, param.shape))
    except (TypeError, ValueError) as error:
        raise ValueError(f"state_dict: its mask of {name} does not fit: {error}") from error


def refuse_differentiable(differentiable: bool) -> None:
    """Raise ValueError where autograd is to run through the step."""
    if differentiable:
        raise ValueError(
            "differentiable: expected False, got True: the update is done in place, in one pass, and "
            "autograd cannot run through it"
        )
