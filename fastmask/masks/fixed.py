"""FixedMask: packed bits that nothing changes but the one who sets them."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.masks.mask import Mask, select
from fastmask.ops.masked_conv2d.op import Padding, Pair


class FixedMask(Mask):
    """Activate the weights whose bit is 1, in training and in evaluation alike.

    The bits are the buffer `bits`, n / 8 bytes: copying others into it switches the mask, also in
    compiled code. The weight stays trainable; inactive entries take no gradient.

    Args:
        active: the mask of a weight, 1 = takes part.

    Raises:
        TypeError: `active` is no BitMask.
    """

    freezes_weight = False
    bits: Tensor

    def __init__(self, active: BitMask) -> None:
        super().__init__()
        if not isinstance(active, BitMask):
            raise TypeError(f"active: expected a fastmask.BitMask, got {type(active).__name__}")
        self._shape = active.shape
        self.register_buffer("bits", active.bits.clone())

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def for_weight(self, weight: Tensor) -> Self:
        self._fits(weight, self.bits)
        return self

    def bits_now(self) -> Tensor:
        return self.bits

    def made_from(self) -> tuple[Tensor, dict[str, Any], bool]:
        return self.bits, {}, False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.masked_linear(x, weight, self.bits, bias)

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
        return ops.masked_conv2d(x, weight, self.bits, bias, stride, padding, dilation, groups)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        # Ops do not look at padding bits, and counting would take them for ones.
        given = state_dict.get(f"{prefix}bits")
        if given is not None and given.shape == self.bits.shape:
            try:
                BitMask(given, self._shape)
            except (TypeError, ValueError) as error:
                lists[-1].append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def effective(self, weight: Tensor) -> Tensor:
        return select(weight, self.bits)

    def settings(self) -> dict[str, Any]:
        on_meta = self.bits.device.type == "meta"
        return {} if on_meta else {"density": round(self.density, 4)}
