"""A small network of masked layers, and the numbers its scores are stepped with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmask.masks import GumbelMask, ThresholdMask, TopKMask
from fastmask.nn import MaskedLinear

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
MASKS = {
    "gumbel": GumbelMask(samples=2, tau=0.7),
    "threshold": ThresholdMask("kaiming", off="flip"),
    "topk": TopKMask(0.3),
    "scaled": ThresholdMask("kaiming", scale="rsqrt_density"),
}


class Net(nn.Module):
    """Two masked layers, one of them applied twice where `shared`, and a plain one."""

    def __init__(self, mask: Any = MASKS["gumbel"], shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = MaskedLinear(9, 9, mask=mask)
        self.second = MaskedLinear(9, 9, mask=mask)
        self.head, self.shared = nn.Linear(9, 3), shared

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.first(x) if self.shared else self.second(x)
        return self.head(x)


def scores_of(model: nn.Module) -> list[nn.Parameter]:
    return [m.mask.own_scores() for m in model.modules() if isinstance(m, MaskedLinear)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()
