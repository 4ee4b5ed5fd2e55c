"""MaskedConv2d: torch.nn.Conv2d with a mask over its weight."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.nn.masked_layer import MaskedLayer
from fastmask.nn.prepare import prepared_weight
from fastmask.ops.masked_conv2d.op import Padding

ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
    "output_padding", "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """Compute `conv2d(x, where(active, weight, 0), bias)` with bits that a mask decides: `mask.conv2d`.

    In the place of `torch.nn.Conv2d`: same constructor order, same `weight` and `bias` keys. What
    `MaskedLinear` says of masks, checkpoints, frozen weights, `train()` and `eval()` holds here too; a
    mask of S samples takes S equal groups of consecutive images.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: (R, T), or one number for both.
        stride: steps, one number or a pair.
        padding: on either side, one number or a pair; `valid` is none, `same` keeps height and width.
        dilation: spacing of the kernel's elements, one number or a pair.
        groups: number of groups of channels; C for a depthwise convolution.
        bias: whether there is a bias (N,).
        padding_mode: `zeros`, `reflect`, `replicate` or `circular`.
        device: of the weight, the bias and the mask's scores.
        dtype: of the weight and the bias; scores are float32, and stay it under `.half()` and `.to(dtype)`.
        mask: a template (its settings are copied, with scores of its own) or the mask of an
            (N, C / groups, R, T) weight.

    Raises:
        TypeError: `mask` is no mask.
        ValueError: the mask is of another shape or on another device; torch refuses the convolution.
    """

    takes_prepared_weight = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Mask,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._own(mask)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Mask) -> Self:
        """Return a masked layer that shares the parameters of a plain one, in its mode.

        Under a learned mask this freezes the shared weight. Hooks stay with the plain layer.

        Raises:
            TypeError: `conv` is a subclass, whose own forward would be lost, or `mask` is no mask.
            ValueError: the weight is no parameter of its own (weight_norm, prune); the mask does not fit.
        """
        return cls._adopt("conv", conv, nn.Conv2d, ATTRIBUTES, mask)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        ready = prepared_weight(self, input)
        if ready is not None and weight is self.weight:
            return F.conv2d(input, ready, bias, self.stride, padding, self.dilation, self.groups)
        return self.mask.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )
