"""MaskedConv2dSame: a masked convolution that pads like TensorFlow, as timm's Conv2dSame does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmask.nn.conv import MaskedConv2d


class MaskedConv2dSame(MaskedConv2d):
    """Compute a masked convolution of the input padded to `ceil(size / stride)` outputs a side.

    What `mask_` makes of timm's `Conv2dSame`: the padding depends on the input's size, and an odd one
    is larger at the right and at the bottom.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, C, H, W) through the masked weight, (B, N, ceil(H / stride), ceil(W / stride))."""
        height, width = (
            same_padding(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return self._conv_forward(F.pad(input, (*width, *height)), self.weight, self.bias)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after a side of this size: as few as make `ceil(size / stride)` outputs."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
