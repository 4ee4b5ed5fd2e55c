"""What several benchmarks compare with: prune, torch.compile, the Gumbel-sigmoid in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def in_turn(function: Callable[..., object], copies: Sequence[tuple[Any, ...]]) -> Any:
    """Call a function on the copies of its tensors, one after the other."""
    return lambda i: function(*copies[i % len(copies)])


def pruned(make: Callable[[], nn.Module], weight: Tensor, keep: Tensor) -> nn.Module:
    """A layer of torch's own whose weight is pruned to a mask: its hook multiplies before each forward."""
    layer = make()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    prune.custom_from_mask(layer, "weight", keep)  # type: ignore[no-untyped-call]
    return layer


def compiled(function: Callable[..., object], device: torch.device) -> Callable[..., object]:
    """Compile for one shape; a GPU's variants are tuned, and captured by the clock, not by the compiler."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def unpacked(weight: Tensor, bits: Tensor) -> Tensor:
    """`where(active, weight, 0)` from bits in plain torch, eight elements a byte."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    active = (bits[: weight.numel() // 8, None] >> shifts & 1).view(weight.shape)
    return torch.where(active.bool(), weight, 0)


def gumbel(logits: Tensor) -> Tensor:
    """A hard sample with the gradient of the soft one, from two uniform draws as the method's origin has."""
    noise = torch.log(torch.log(torch.rand_like(logits)) / torch.log(torch.rand_like(logits)))
    soft = torch.sigmoid(logits - noise)
    return (soft > 0.5).float() - soft.detach() + soft


def passing(logits: Tensor) -> Tensor:
    """A sample from one uniform draw, with the gradient of the sigmoid."""
    soft = torch.sigmoid(logits)
    return (torch.rand_like(soft) < soft).float() - soft.detach() + soft


def some_rows(count: int, device: torch.device, most: int = 64) -> Tensor:
    """Indices of rows to check: all on a GPU, on the CPU so many, both ends among them."""
    if device.type == "cuda" or count <= most:
        return torch.arange(count, device=device)
    return torch.linspace(0, count - 1, most, device=device).round().long()


def dtypes(setup: Any, on_cpu: Sequence[torch.dtype], on_gpu: Sequence[torch.dtype]) -> Any:
    """The dtypes asked for, or those of the device."""
    return setup.dtypes or (on_gpu if setup.device.type == "cuda" else on_cpu)
