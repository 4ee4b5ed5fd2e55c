"""prepared: the masked weights of all convolutions of a model at once, for as long as they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmask import ops
from fastmask.masks import Mask


@dataclass(frozen=True)
class _Origin:
    """What a masked weight is made from: the weight, what decides its bits and how; writes and addresses."""

    weight: Tensor
    source: Tensor
    settings: dict[str, Any]
    learns: bool
    rest: tuple[Any, ...]

    def same(self, other: _Origin | None) -> bool:
        if other is None or self.weight is not other.weight or self.source is not other.source:
            return False
        return (self.settings, self.learns, self.rest) == (
            other.settings,
            other.learns,
            other.rest,
        )

    def kind(self) -> tuple[Any, ...]:
        """What weights that are made in one launch have in common."""
        alike = (self.weight.device, self.weight.dtype, self.learns)
        if not self.learns:
            return alike
        options = {**self.settings, "seed": self.settings.get("seed") is None}
        return *alike, self.source.dtype, *options.items()


@dataclass
class _Ready:
    """A masked weight and its origin, whose memory is kept: nothing else comes to lie at its addresses."""

    weight: Tensor
    origin: _Origin
    kept: tuple[Tensor, Tensor]
    spent: bool = False


# In the context of a thread, so that no other sees weights whose graph is not its own.
_ready: ContextVar[Mapping[nn.Module, _Ready]] = ContextVar("ready", default=MappingProxyType({}))


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Make the weights of all masked convolutions of `model` in one launch and use them in this block.

    Without it each masked convolution makes its weight in each call. For inference enter once around all
    batches:

        with torch.no_grad(), fastmask.nn.prepared(model):
            for batch in batches:
                model(batch)

    For training once a step, around the forward at least: masks that learn draw and select in one launch, and
    in the backward the gradients of all weights and scores are made in one.

        with fastmask.nn.prepared(model):
            loss(model(batch)).backward()
        optimizer.step()

    Results are those without it, on a GPU within rounding, for masks that are sampled given equal seeds;
    it holds a copy of the weights meanwhile. A weight is never stale: a layer makes its own again as soon
    as its weight, its bits or scores, or its mask's settings or mode are others, were written to or moved,
    and where gradients are wanted that the copy cannot give. A weight that is learned, or that gradients go
    through, serves the layer's first call alone: each call draws anew, and each has a backward of its own.

    Seeds are drawn on entering, as `draw_seed` draws them and `torch.manual_seed` rules: of all layers with
    one dtype and equal settings together, in the order of `model.named_modules()`.

    By themselves work throughout: layers that rescale, or learn by several samples; those that learn while
    gradients are off; under gradients whatever `torch.utils.checkpoint` or a hook on saved tensors surrounds;
    compiled code; threads that the block starts. What autograd does not see either, writing into `.data` or a
    NumPy view, is not seen: leave the block first.

    Args:
        model: any network; its modules that are `MaskedConv2d` are prepared. A `MaskedLinear` needs no
            weight: its product draws and selects as it reads.

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
        if origin is not None and (not origin.learns or _recorded_plainly()):
            found[name] = layer, origin
    made = {}
    for kind in dict.fromkeys(origin.kind() for _, origin in found.values()):
        some = [(layer, origin) for layer, origin in found.values() if origin.kind() == kind]
        for (layer, origin), weight in zip(some, _made(some), strict=True):
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
    if ready is None or ready.spent:
        return None
    weight, pretrained, learns = ready.weight, ready.origin.weight, ready.origin.learns
    ready.spent = learns or weight.requires_grad
    # First of all: what stands in for a parameter in a functional call has no address to ask for.
    if layer.weight is not pretrained or not ready.origin.same(_origin(layer)):
        return None
    recording = torch.is_grad_enabled()
    if (recording or learns) and not _recorded_plainly():
        return None
    if recording and pretrained.requires_grad and not weight.requires_grad:
        return None
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return weight if weight.dtype == x.dtype else None
    # Rounded from the weight itself, here or by the convolution, and not twice.
    return weight if weight.dtype in (torch.get_autocast_dtype(kind), pretrained.dtype) else None


def _made(layers: Sequence[tuple[nn.Module, _Origin]]) -> list[Tensor]:
    """The masked weights of layers of one kind."""
    weights, first = [origin.weight for _, origin in layers], layers[0][1]
    if not first.learns:
        masks = (cast(Mask, layer.mask) for layer, _ in layers)
        return ops.masked_weights(weights, [mask.bits_now() for mask in masks])
    options = {key: value for key, value in first.settings.items() if key != "seed"}
    # A mask may have a seed of its own.
    given: list[Any] = [origin.settings.get("seed") for _, origin in layers]
    seeds = None if given[0] is None else given
    return ops.learned_weights(
        weights, [origin.source for _, origin in layers], seeds=seeds, **options
    )


def _recorded_plainly() -> bool:
    """Whether autograd records what is computed, to be run backward once as it is.

    Under hooks on saved tensors and within a backward a checkpoint may compute it again, and has to find the
    same: what each call makes by itself.
    """
    c = torch._C
    hooked = c._autograd._top_saved_tensors_default_hooks(True) is not None
    return torch.is_grad_enabled() and not hooked and c._current_graph_task_id() == -1


def _origin(layer: nn.Module) -> _Origin | None:
    """What a layer's masked weight is made from now; None where it is not made from that alone."""
    weight, mask = layer.weight, layer.mask
    made_from = mask.made_from() if isinstance(mask, Mask) else None
    if made_from is None or not isinstance(weight, Tensor):
        return None
    source, settings, learns = made_from
    if weight.is_inference() or source.is_inference() or weight.device.type == "meta":
        return None
    # A graph that is captured replays what it holds: weights made outside it would stay what they are.
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    written = (weight._version, weight.data_ptr(), source._version, source.data_ptr())
    wanted = (weight.requires_grad, source.requires_grad) if learns else ()
    return _Origin(weight, source, settings, learns, (*written, captured, *wanted))
