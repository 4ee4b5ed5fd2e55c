"""From plain networks to masked ones and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.nn.attention import AttentionMasks
from fastmask.nn.support import (
    MASKED,
    PLAIN,
    is_masked,
    is_weighted,
    masked_type,
    masks,
    read_by_parents,
    weights,
    why_not,
)

Filter = Callable[[str, nn.Module], bool]

# What a masked layer remembers of itself, and a parent of its fast path, until the masks are gone.
_KIND = "_plain_type"
_TRAINED = "_weights_required_grad"
_FAST = "_fast_path_before_masks"
# Where torch's encoders look before they read the weights of their layers and call none of them.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


@dataclass(frozen=True, repr=False)
class Conversion:
    """What `mask_` did: the layers that it converted, and why it left others of their kind alone."""

    converted: tuple[str, ...]
    skipped: Mapping[str, str]

    def __repr__(self) -> str:
        lines = [f"Conversion: {len(self.converted)} converted, {len(self.skipped)} left alone"]
        lines += [f"  + {_called(name)}" for name in self.converted]
        lines += [f"  - {_called(name)}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def mask_(
    model: nn.Module, mask: Mask | Mapping[str, Mask], filter_fn: Filter | None = None
) -> Conversion:
    """Give each supported layer of `model` a mask of its own: its forward reads `where(active, weight, 0)`.

    In place: a layer stays the object that it is, with its parameters, hooks and mode, and becomes a
    `MaskedLinear`, `MaskedConv2d` (timm's `Conv2dSame` a `MaskedConv2dSame`) or
    `MaskedMultiheadAttention`, which masks its `out_proj` itself. What else refers to it
    (a second name, a list) sees the masked layer; the scores are new parameters, which an optimizer
    made earlier does not know. A learned mask freezes the weight. A layer under two names is converted
    once; a weight that two layers share stays shared, each with its own mask (a decoder tied to an
    embedding: the embedding reads the whole weight), and is frozen for both.

    Torch's encoders read the weights of their layers on a fast path, past any mask: it is switched off
    in each encoder inside `model` with a masked layer. Where `model` is only a part of such an encoder,
    the encoder is out of reach: convert the whole.

    Args:
        model: any network; a single layer will do.
        mask: a template, copied for each weight, or a mask of the shape that all chosen layers have. For
            layers of several weights also masks by name: `{"in_proj": ..., "out_proj": ...}` for attention.
        filter_fn: called as `filter_fn(name, module)` for each linear layer and convolution of any sort,
            each `nn.MultiheadAttention` and each masked layer; true converts it. Default: every
            supported one, and no word but in the record on those that are not.

    Returns:
        The names converted, and those left alone with the reason. Layers for which `filter_fn` is false
        are not in it.

    Raises:
        TypeError: `model` is no module, `mask` is no mask or mapping of them, `filter_fn` cannot be called.
        ValueError: nothing is chosen; a layer is masked already; `filter_fn` chooses one that cannot take
            a mask; the mask does not fit one. Nothing has been changed then.
    """
    _check_model(model)
    for each in mask.values() if isinstance(mask, Mapping) else (mask,):
        if not isinstance(each, Mask):
            raise TypeError(f"mask: expected a fastmask mask, got {type(each).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn: expected a function of (name, module), got {type(filter_fn).__name__}"
        )
    chosen, skipped = _choose(model, filter_fn)
    made = {layer: _masks_of(name, layer, mask) for layer, name in chosen.items()}
    # All are asked before the first is frozen: a weight may be shared.
    trained = {
        layer: {name: weight.requires_grad for name, weight in _weights(layer).items()}
        for layer in chosen
    }
    for layer, own in made.items():
        kind, masked = type(layer), masked_type(layer)
        assert masked is not None
        layer.__class__ = masked
        attention = isinstance(layer, nn.MultiheadAttention)
        layer.mask = AttentionMasks(own) if attention else own["weight"]
        layer.mask.train(layer.training)
        setattr(layer, _KIND, kind)
        setattr(layer, _TRAINED, trained[layer])
        for name, weight in _weights(layer).items():
            if own[name].freezes_weight:
                weight.requires_grad_(False)
    _leave_fast_paths(model)
    return Conversion(tuple(chosen.values()), MappingProxyType(skipped))


def unmask_(model: nn.Module) -> tuple[str, ...]:
    """Take the masks off: each masked layer of `model` is the plain one again, its weight untouched.

    Undoes `mask_` exactly: the same modules and parameters, hooks, modes and `state_dict()`; weights
    require gradients as they did before, and encoders take their fast path again. A layer that was made
    as a masked one becomes a plain one, and its weight requires gradients as it does now.

    Returns:
        The names of the layers that were masked.

    Raises:
        TypeError: `model` is no module.
        ValueError: no layer is masked, or one is of a type derived from a masked layer.
    """
    layers = _masked_layers(model)
    for layer in layers:
        _strip(layer)
    _restore_fast_paths(model)
    return tuple(layers.values())


@torch.no_grad()
def bake_(model: nn.Module) -> tuple[str, ...]:
    """Write what the masks do into the weights and leave plain layers: `weight = where(active, weight, 0)`.

    With the bits, the flip and the scale of evaluation, whatever mode the model is in; NaN under the mask
    becomes 0. Parameters stay the same objects. The masks are gone, and with them the weights that
    they hid; the rest is as after `unmask_`.

    Returns:
        The names of the layers that were masked.

    Raises:
        TypeError: `model` is no module.
        ValueError: no layer is masked, or a masked weight is shared with another module, which would be
            changed too. Nothing has been changed then.
    """
    layers = _masked_layers(model)
    _refuse_shared(model, layers)
    for layer in layers:
        own = masks(layer)
        for name, weight in _weights(layer).items():
            weight.copy_(own[name].eval().effective(weight)[0])
        _strip(layer)
    _restore_fast_paths(model)
    return tuple(layers.values())


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return `model.state_dict()` without its masks: it loads strictly into the plain network.

    Keys of modules that are no `fastmask.masks.Mask` stay, whatever they are called. The weights are
    those under the masks, not multiplied by them.

    Args:
        model: a network with masked layers.

    Raises:
        TypeError: `model` is no module.
    """
    _check_model(model)
    modules = model.named_modules(remove_duplicate=False)
    masks = tuple(f"{name}." for name, module in modules if isinstance(module, Mask) and name)
    state = model.state_dict()
    for key in [key for key in state if key.startswith(masks)]:
        del state[key]
    return state


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _choose(
    model: nn.Module, filter_fn: Filter | None
) -> tuple[dict[nn.Module, str], dict[str, str]]:
    """The layers to convert by name, and the reasons for those left alone; raise on what is refused."""
    readers = read_by_parents(model)
    chosen: dict[nn.Module, str] = {}
    skipped: dict[str, str] = {}
    seen: set[nn.Module] = set()
    by_attention: set[nn.Module] = set()
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not is_weighted(layer) or layer in chosen or layer in by_attention:
            continue
        if is_masked(layer):
            by_attention.update(_inside(layer))
        if filter_fn is None and layer in seen:
            continue
        seen.add(layer)
        if filter_fn is not None and not filter_fn(name, layer):
            continue
        reason = why_not(layer) if is_masked(layer) else readers.get(layer) or why_not(layer)
        if reason is None:
            chosen[layer] = name
            by_attention.update(_inside(layer))
        elif filter_fn is not None or is_masked(layer):
            raise ValueError(
                f"model: {_called(name)} cannot be masked: {reason}; nothing was changed"
            )
        else:
            skipped[name] = reason
    if not chosen:
        raise ValueError(_nothing(len(seen), skipped, filter_fn))
    return chosen, skipped


def _nothing(asked: int, skipped: Mapping[str, str], filter_fn: Filter | None) -> str:
    if filter_fn is not None and asked:
        return f"filter_fn: expected it to choose a layer, it chose none of the {asked} it was asked about"
    reasons = "; ".join(f"{_called(name)}: {reason}" for name, reason in skipped.items())
    kinds = ", ".join(plain.__name__ for plain in MASKED)
    return f"model: expected a supported layer ({kinds}), found none" + (
        reasons and f" ({reasons})"
    )


def _inside(layer: nn.Module) -> list[nn.Module]:
    """The modules inside a layer whose weights its masks are over."""
    return [owner for owner, _ in weights(layer).values() if owner is not layer]


def _masks_of(name: str, layer: nn.Module, mask: Mask | Mapping[str, Mask]) -> dict[str, Mask]:
    """The masks that a layer is to own; an error of the mask names the layer."""
    places, made = _weights(layer), {}
    given = mask if isinstance(mask, Mapping) else dict.fromkeys(places, mask)
    if given.keys() != places.keys():
        raise ValueError(
            f"mask: for layer {_called(name)}: expected masks named {list(places)}, got {list(given)}"
        )
    for key, weight in places.items():
        own = given[key] if given[key].shape is None else copy.deepcopy(given[key])
        try:
            made[key] = own.for_weight(weight)
        except (TypeError, ValueError) as error:
            which = _called(name) + (f" ({key})" if key != "weight" else "")
            raise type(error)(f"mask: for layer {which}: {error}") from error
    return made


def _masked_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The masked layers of a model by name; raise where there are none or no plain type is known."""
    _check_model(model)
    layers = {module: name for name, module in model.named_modules() if is_masked(module)}
    if not layers:
        raise ValueError("model: expected masked layers, found none")
    for layer, name in layers.items():
        if _KIND not in layer.__dict__ and type(layer) not in PLAIN:
            raise ValueError(
                f"model: {_called(name)} is a {type(layer).__name__}, derived from a masked layer: "
                "what it is without its mask is not known; nothing was changed"
            )
    return layers


def _strip(layer: nn.Module) -> None:
    """Make a masked layer the plain one, its weights requiring gradients as they did."""
    trained = layer.__dict__.pop(_TRAINED, {})
    del layer.mask
    kind = layer.__dict__.pop(_KIND, None)
    layer.__class__ = PLAIN[type(layer)] if kind is None else kind
    for name, weight in _weights(layer).items():
        weight.requires_grad_(trained.get(name, weight.requires_grad))


def _refuse_shared(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    users: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append(f"{name}.{key}" if name else key)
    for names in (users[weight] for layer in layers for weight in _weights(layer).values()):
        if len(names) > 1:
            raise ValueError(
                f"model: {' and '.join(names)} are one parameter: to bake a mask into it would change "
                "them all; give the masked layer a weight of its own first (nothing was changed)"
            )


def _leave_fast_paths(model: nn.Module) -> None:
    for parent in model.modules():
        if _FAST in parent.__dict__ or not any(is_masked(module) for module in parent.modules()):
            continue
        for kind, (flag, off) in _FAST_PATHS.items():
            if isinstance(parent, kind) and hasattr(parent, flag):
                setattr(parent, _FAST, (flag, getattr(parent, flag)))
                setattr(parent, flag, off)


def _restore_fast_paths(model: nn.Module) -> None:
    for parent in model.modules():
        before = parent.__dict__.pop(_FAST, None)
        if before is not None:
            setattr(parent, *before)


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer by the names of their masks."""
    found: dict[str, Tensor] = {}
    for name, (owner, key) in weights(layer).items():
        weight = owner._parameters[key]
        assert weight is not None
        found[name] = weight
    return found


def _called(name: str) -> str:
    return name or "the model itself"
