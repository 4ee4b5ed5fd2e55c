"""What launchers share: the device that is current while a kernel starts, when offsets need 64 bits."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make a tensor's device the current one, on whose stream Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def wide(numel: int) -> bool:
    """Whether indices of so many elements, and of one block behind them, need 64 bits."""
    return numel > 2**31 - 2**20


def number(scalar: Tensor) -> float | Tensor:
    """A tensor of one element as a number where it is on the CPU; on a device it stays, unread."""
    return scalar.item() if scalar.device.type == "cpu" else scalar.reshape(())


def capability(tensor: Tensor) -> int:
    """Compute capability of a tensor's device as a number; off a GPU 90, to plan as for an H100."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
