"""From masked networks to plain ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmask.masks import Mask


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return `model.state_dict()` without its masks: it loads strictly into the plain network.

    Keys of modules that are no `fastmask.masks.Mask` stay, whatever they are called. The weights are
    those under the masks, not multiplied by them.

    Args:
        model: a network with masked layers.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = model.named_modules(remove_duplicate=False)
    masks = tuple(f"{name}." for name, module in modules if isinstance(module, Mask) and name)
    state = model.state_dict()
    for key in [key for key in state if key.startswith(masks)]:
        del state[key]
    return state
