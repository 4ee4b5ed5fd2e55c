"""pack: a bool tensor, or scores above a threshold, as packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register


def pack(mask: Tensor, mu: float | None = None, *, backend: str = "auto") -> Tensor:
    """Pack `mask`, or `scores > mu`, into bits: `byte[e // 8] |= mask.flatten()[e] << (e % 8)`.

    Elements are taken in logical (contiguous) order, whatever the strides; padding bits are 0. Equal to
    `numpy.packbits(bitorder="little")` up to that padding. A NaN score packs to 0, a tie with mu too.

    Args:
        mask: bool tensor of any shape; with `mu`, a floating tensor of scores.
        mu: threshold of the scores; required for a floating tensor, refused for a bool one.
        backend: `auto` or the name of a back end.

    Returns:
        uint8 tensor of `ceil(n / 64) * 8` bytes on the device of `mask`.

    Raises:
        TypeError: `mask` is neither bool nor, with `mu`, floating.
        ValueError: `mu` is NaN or infinite.

    Gradients: none. Deterministic: yes.
    """
    _checks.tensor("mask", mask)
    if mu is None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected dtype torch.bool, or scores together with mu, got {mask.dtype}"
            )
        mu = 0.0
    else:
        _checks.floating("mask", mask)
        mu = _checks.finite("mu", mu)
    return torch.ops.fastmask.pack(mask.detach(), mu, backend)


def _implementation(mask: Tensor, mu: float, backend: str) -> Tensor:
    return _backend.resolve("pack", backend, mask.device, mask.dtype).pack(mask, mu)


def _fake(mask: Tensor, mu: float, backend: str) -> Tensor:
    return mask.new_empty(packed_bytes(mask.numel()), dtype=torch.uint8)


register("pack(Tensor mask, float mu, str backend) -> Tensor", _implementation, _fake)
