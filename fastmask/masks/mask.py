"""Mask: what every mask module is, and ScoreMask: one whose bits come from trainable scores."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.ops import _checks
from fastmask.ops.learned_linear.op import check_off
from fastmask.ops.masked_conv2d.op import Padding, Pair

Init = float | Literal["kaiming", "magnitude"]
Off = Literal["zero", "flip"]
Scale = Literal["rsqrt_density"] | None


class Mask(nn.Module, ABC):
    """Decide which entries of one weight are active.

    A mask without a shape is a template: `for_weight` makes of it the mask of one weight.
    """

    # Whether the weight under it is pretrained and stays as it is while the mask is learned.
    freezes_weight: ClassVar[bool]

    @property
    @abstractmethod
    def shape(self) -> torch.Size | None:
        """Shape of the weight it is of; None for a template."""

    @abstractmethod
    def for_weight(self, weight: Tensor) -> Self:
        """Return the mask that a layer with this weight owns: a new one, or itself if it has that shape.

        Raises:
            ValueError: the mask is of another shape or on another device.
        """

    @abstractmethod
    def bits_now(self) -> Tensor:
        """Packed bits uint8 (bytes,) of evaluation: 1 = active."""

    def made_from(self) -> tuple[Tensor, dict[str, Any], bool] | None:
        """What decides the masked weight that a forward reads now: a tensor, settings, whether that learns.

        Where it learns, that weight is `learned_weights`' of these settings, else `masked_weights`' of
        `bits_now`. None where it is neither: of several samples, say, or rescaled.
        """
        return None

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x (..., K) through the masked weight (N, K): (..., N)."""

    @abstractmethod
    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> Tensor:
        """Compute images x (B, C, H, W) through the masked weight (N, C / groups, R, T): (B, N, H', W')."""

    @abstractmethod
    def effective(self, weight: Tensor) -> Tensor:
        """Return the masked weight itself, (S, *weight.shape), for modules that read weights by a rule.

        S is the number of samples in training, else 1. Gradients reach what `linear` gives gradients.
        """

    def active(self) -> BitMask:
        """The mask of evaluation, 1 = the weight takes part."""
        return BitMask(self.bits_now(), self._known_shape())

    @property
    def density(self) -> float:
        """Share of active entries in evaluation."""
        return self.active().density

    def settings(self) -> dict[str, Any]:
        """What it was made with, for `repr`."""
        return {}

    def extra_repr(self) -> str:
        shape = "template" if self.shape is None else f"shape={tuple(self.shape)}"
        return ", ".join([shape, *(f"{key}={value!r}" for key, value in self.settings().items())])

    def _known_shape(self) -> torch.Size:
        if self.shape is None:
            raise ValueError(
                f"{type(self).__name__}: expected the mask of a weight, got a template; "
                "make one with for_weight(weight)"
            )
        return self.shape

    def _fits(self, weight: Tensor, tensor: Tensor) -> None:
        """Raise unless the mask is of this weight's shape and device."""
        if self.shape != weight.shape:
            raise ValueError(
                f"{type(self).__name__}: expected a weight of shape {tuple(self._known_shape())}, "
                f"got {tuple(weight.shape)}"
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"{type(self).__name__}: expected a weight on {tensor.device} like the mask, got one on "
                f"{weight.device}"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        # A checkpoint of the plain network knows no mask: it loads strictly and leaves this one alone.
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class ScoreMask(Mask):
    """A mask whose bits are a function of float32 scores, one for each weight."""

    freezes_weight = True
    # Name of the parameter: scores, or logits where they are log odds.
    scores_name: ClassVar[str] = "scores"

    def __init__(self, init: Init, off: Off = "zero", scale: Scale = None) -> None:
        super().__init__()
        check_off(off, scale)
        self.init, self.off, self.scale = check_init(init), off, scale
        self.register_parameter(self.scores_name, None)

    @abstractmethod
    def learned_options(self) -> dict[str, Any]:
        """Options of `learned_linear`: how scores decide bits, and what those do to the weight."""

    @property
    def shape(self) -> torch.Size | None:
        scores = self._parameters[self.scores_name]
        return None if scores is None else scores.shape

    def own_scores(self) -> nn.Parameter:
        """The scores, whatever their name; raise in a template."""
        self._known_shape()
        scores = self._parameters[self.scores_name]
        assert scores is not None
        return scores

    def for_weight(self, weight: Tensor) -> Self:
        _checks.floating("weight", weight)
        if self.shape is not None:
            self._fits(weight, self.own_scores())
            return self
        mask = copy.deepcopy(self)
        scores = nn.Parameter(first_scores(weight.detach(), self.init))
        mask.register_parameter(self.scores_name, scores)
        return mask

    def made_from(self) -> tuple[Tensor, dict[str, Any], bool] | None:
        settings = self.learned_options()
        single = settings.pop("samples", 1) == 1 and settings.pop("scale", None) is None
        if not (single if self.training else self._bits_say_all()):
            return None
        return self.own_scores(), settings, self.training

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x (..., K) through the masked weight (N, K): (..., N).

        In training gradients reach the scores, straight-through. In evaluation nothing is drawn,
        `active()` decides, and the scores take no gradient.
        """
        return self._masked(ops.masked_linear, ops.learned_linear, x, weight, {"bias": bias})

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> Tensor:
        """Compute images x (B, C, H, W) through the masked weight, as `linear` does rows."""
        rest = {
            "bias": bias, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        }  # fmt: skip
        return self._masked(ops.masked_conv2d, ops.learned_conv2d, x, weight, rest)

    def effective(self, weight: Tensor) -> Tensor:
        scores = self.own_scores()
        if self.training:
            return ops.learned_weight(weight, scores, **self.learned_options())
        if self._bits_say_all():
            return select(weight, self.bits_now())
        return ops.learned_weight(weight, scores.detach(), **self.learned_options())

    def _bits_say_all(self) -> bool:
        """Whether an inactive weight is 0 and an active one itself."""
        return self.off == "zero" and self.scale is None

    def _masked(
        self,
        masked: Callable[..., Tensor],
        learned: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        rest: dict[str, Any],
    ) -> Tensor:
        """Learn in training; in evaluation read the bits, or the fixed scores where bits do not say all."""
        scores = self.own_scores()
        if self.training:
            return learned(x, weight, scores, **rest, **self.learned_options())
        if self._bits_say_all():
            return masked(x, weight, self.bits_now(), **rest)
        return learned(x, weight, scores.detach(), **rest, **self.learned_options())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Scores stay float32 whatever a model is cast to: a step of 1e-3 from 2.0 is lost in bfloat16.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def select(weight: Tensor, active: Tensor) -> Tensor:
    """`where(active, weight, 0)` of packed bits, (1, *weight.shape)."""
    ones = ops.unpack(active, weight.shape)
    return torch.where(ones, weight, weight.new_zeros(())).unsqueeze(0)


def first_scores(weight: Tensor, init: Init) -> Tensor:
    """Scores of a weight: a constant; `kaiming`, uniform within 1 / sqrt(fan_in); `magnitude`, |W|."""
    if init == "magnitude":
        return weight.abs().float()
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if init == "kaiming":
        fan_in = max(weight[0].numel(), 1) if len(weight) else 1
        return scores.uniform_(-(fan_in**-0.5), fan_in**-0.5)
    return scores.fill_(init)


def check_init(init: Init) -> Init:
    """Return an initial score as a number or one of the names, or raise."""
    if isinstance(init, str):
        _checks.one_of("init", init, ("kaiming", "magnitude"))
        return init
    return _checks.finite("init", init)
