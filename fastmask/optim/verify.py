"""verify_frozen: notice that a frozen entry has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.bits import BitMask
from fastmask.errors import FrozenEntriesMoved

Tensors = nn.Module | Mapping[str, Tensor] | Mapping[Tensor, Tensor]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def verify_frozen(
    reference: Tensors,
    current: Tensors,
    frozen: Mapping[str, BitMask] | Mapping[Tensor, BitMask],
) -> None:
    """Compare the frozen entries of two sets of tensors as integers, so that NaN and -0.0 count too.

        before = copy.deepcopy(model.state_dict())
        ...                                     # train
        verify_frozen(before, model, frozen)    # or two state dicts, masks by name

    Args:
        reference: values to hold to: a state dict, a module, or a mapping of parameters to tensors.
            It must be a copy: `state_dict()` alone is the live memory and would never differ.
        current: values to look at, likewise.
        frozen: masks, 1 = frozen, by name or by parameter. Where keys are parameters and a set of
            tensors goes by name, the other must be the module, which knows their names.

    Raises:
        FrozenEntriesMoved: entries differ; names each tensor, how many moved, the first of them.
        TypeError, ValueError: a tensor is missing, of another shape or dtype than its mask or its
            counterpart, or one memory with it.
    """
    if not isinstance(frozen, Mapping):
        raise TypeError(f"frozen: expected a mapping to BitMasks, got {type(frozen).__name__}")
    names = _names(reference) | _names(current)
    params = {name: param for param, name in names.items()}
    moved = []
    for key, mask in frozen.items():
        if not isinstance(mask, BitMask):
            raise TypeError(f"frozen: expected BitMasks as values, got {type(mask).__name__}")
        name, param = (
            (key, params.get(key)) if isinstance(key, str) else (names.get(key, "parameter"), key)
        )
        old = _find("reference", reference, name, param)
        new = _find("current", current, name, param)
        _comparable(name, old, new, mask)
        report = _difference(old, new, mask)
        if report:
            moved.append(f"{name}: {report}")
    if moved:
        raise FrozenEntriesMoved("frozen entries have moved. " + "; ".join(moved))


def _names(tensors: Tensors) -> dict[Tensor, str]:
    """Names of a module's parameters; nothing for a mapping."""
    if not isinstance(tensors, nn.Module):
        return {}
    return {param: name for name, param in tensors.named_parameters()}


def _find(argument: str, tensors: Tensors, name: str, param: Tensor | None) -> Tensor:
    """The tensor of this name, or else of this parameter."""
    table: Mapping[Any, Tensor] = (
        tensors.state_dict(keep_vars=True) if isinstance(tensors, nn.Module) else tensors
    )
    if not isinstance(table, Mapping):
        raise TypeError(f"{argument}: expected a module or a mapping, got {type(tensors).__name__}")
    found = table.get(name)
    if found is None and param is not None:
        found = table.get(param)
    if not isinstance(found, Tensor):
        shape = "" if param is None else f" of shape {tuple(param.shape)}"
        raise ValueError(f"{argument}: expected a tensor for {name}{shape}, found none")
    return found


def _comparable(name: str, old: Tensor, new: Tensor, mask: BitMask) -> None:
    for argument, value in (("reference", old), ("current", new)):
        if value.shape != mask.shape:
            raise ValueError(
                f"{argument}: expected shape {tuple(mask.shape)}, that of the mask, for {name}, "
                f"got {tuple(value.shape)}"
            )
    if old.dtype != new.dtype:
        raise TypeError(f"current: expected {old.dtype} like reference for {name}, got {new.dtype}")
    if old.numel() and old.data_ptr() == new.data_ptr() and old.device.type != "meta":
        raise ValueError(
            f"reference: {name} is the same memory as in current, so that no change can be seen; "
            "take a copy before training, as copy.deepcopy(model.state_dict())"
        )


def _difference(old: Tensor, new: Tensor, mask: BitMask) -> str:
    """How many frozen entries differ, and the first; empty where none does."""
    ones = mask.to_bool().to(new.device)
    old = old.detach().to(new.device)
    width = _INTEGERS[new.element_size()]
    differ = old.contiguous().view(width) != new.detach().contiguous().view(width)
    differ = (differ & ones).flatten()
    count = int(differ.sum())
    if not count:
        return ""
    place = torch.unravel_index(differ.nonzero()[0, 0], new.shape)
    index = tuple(int(i) for i in place)
    return (
        f"{count} of {mask.count()} frozen entries, the first at {index}, "
        f"{old[index].item()!r} then, {new[index].item()!r} now"
    )
