"""prepared: the masked weights of all convolutions of a model at once, for as long as they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import ops
from fastmask.masks import Mask


@dataclass(frozen=True)
class _Origin:
    """What a masked weight is made from: the weight, what decides its bits, their writes and addresses."""

    weight: Tensor
    source: Tensor
    rest: tuple[Any, ...]

    def same(self, other: _Origin | None) -> bool:
        if other is None or self.weight is not other.weight or self.source is not other.source:
            return False
        return self.rest == other.rest


@dataclass(frozen=True)
class _Ready:
    """A masked weight and its origin, whose memory is kept: nothing else comes to lie at its addresses."""

    weight: Tensor
    origin: _Origin
    kept: tuple[Tensor, Tensor]


# In the context of a thread, so that no other sees weights whose graph is not its own.
_ready: ContextVar[Mapping[nn.Module, _Ready]] = ContextVar("ready", default=MappingProxyType({}))


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Select the weights of all masked convolutions of `model` in one launch and use them in this block.

    Without it each masked convolution selects its weight in each call. For inference enter once around all
    batches; for training once a step, around forward and backward, where the gradients of the weights are
    selected in one launch too:

        with torch.no_grad(), fastmask.nn.prepared(model):
            for batch in batches:
                model(batch)

    Results are those without it, on a GPU within rounding; it holds a copy of the weights meanwhile. A weight
    is never stale: a layer selects by itself again as soon as its weight, its bits or scores, or its mask's
    settings are others, were written to or moved, and where gradients are wanted that the copy cannot give.
    Layers whose mask is learned in training, flips or rescales select by themselves throughout, and so do
    compiled code and threads that the block starts. What autograd does not see either, writing into `.data`
    or a NumPy view, is not seen: leave the block first.

    Args:
        model: any network; its modules that are `MaskedConv2d` are prepared.

    Yields:
        The names of the layers that are prepared.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {}
    for name, layer in model.named_modules():
        origin = _origin(layer) if getattr(layer, "takes_prepared_weight", False) else None
        if origin is not None:
            found[name] = layer, origin
    made = {}
    for kind in dict.fromkeys(_kind(origin) for _, origin in found.values()):
        some = [(layer, origin) for layer, origin in found.values() if _kind(origin) == kind]
        bits = [layer.mask.bits_now() for layer, _ in some]
        weights = ops.masked_weights([origin.weight for _, origin in some], bits)
        for (layer, origin), weight in zip(some, weights, strict=True):
            kept = origin.weight.detach(), origin.source.detach()
            made[layer] = _Ready(weight, origin, kept)
    token = _ready.set({**_ready.get(), **made})
    try:
        yield tuple(found)
    finally:
        _ready.reset(token)


def prepared_weight(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The masked weight of a layer that was prepared and still holds, for an input like x."""
    if torch.compiler.is_compiling():
        return None
    ready = _ready.get().get(layer)
    # First of all: what stands in for a parameter in a functional call has no address to ask for.
    if ready is None or layer.weight is not ready.origin.weight:
        return None
    if not ready.origin.same(_origin(layer)):
        return None
    weight, pretrained = ready.weight, ready.origin.weight
    if torch.is_grad_enabled() and pretrained.requires_grad and not weight.requires_grad:
        return None
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return weight if weight.dtype == x.dtype else None
    # Rounded from the weight itself, here or by the convolution, and not twice.
    return weight if weight.dtype in (torch.get_autocast_dtype(kind), pretrained.dtype) else None


def _kind(origin: _Origin) -> tuple[torch.device, torch.dtype]:
    return origin.weight.device, origin.weight.dtype


def _origin(layer: nn.Module) -> _Origin | None:
    """What a layer's masked weight is made from now; None where it is not made from that alone."""
    weight, mask = layer.weight, layer.mask
    steady = mask.steady() if isinstance(mask, Mask) else None
    if steady is None or not isinstance(weight, Tensor):
        return None
    source, settings = steady
    if weight.is_inference() or source.is_inference() or weight.device.type == "meta":
        return None
    # A graph that is captured replays what it holds: weights made outside it would stay what they are.
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    written = (weight._version, weight.data_ptr(), source._version, source.data_ptr())
    return _Origin(weight, source, (*written, captured, settings))
