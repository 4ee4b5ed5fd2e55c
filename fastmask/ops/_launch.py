"""What the CUDA engine's launchers share: where a tensor's kernels run, its dtype's number, aligned masks."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def place(tensor: Tensor) -> tuple[int, int]:
    """Index of a tensor's device and address of that device's current stream."""
    if not tensor.is_cuda:  # the tests, which run the kernels' sources on the CPU
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def address(tensor: Tensor | None) -> int:
    """Address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rate(lr: Tensor) -> tuple[float, Tensor | None]:
    """A learning rate as a number where it is on the CPU, else as a float32 tensor that is not read here."""
    return (lr.item(), None) if lr.device.type == "cpu" else (0.0, lr.to(torch.float32))
