"""GumbelMask: bits drawn from logits, one mask for each group of rows, learned straight-through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmask import ops
from fastmask.masks.mask import ScoreMask
from fastmask.ops import _checks
from fastmask.ops.learned_linear.op import temperature


class GumbelMask(ScoreMask):
    """Draw masks with `P(active) = sigmoid(logit)` in training; use `logit > 0` in evaluation.

    Every training call draws new bits, `samples` of them, each for an equal group of consecutive rows of
    the input. Gradients reach the parameter `logits`; the noise is that of torch's generator. Give the
    logits no weight decay: it pulls them to 0, where half of the weights are off.

    Args:
        init: first logit of every weight; 2.0 starts with 88 % of the weights active.
        tau: temperature of the relaxed sample behind the gradient.
        samples: masks a call; it has to divide the rows of the input.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.

    Source: arXiv 2308.13957, 5.3; Csordás et al., ICLR 2021.
    """

    scores_name = "logits"
    logits: nn.Parameter

    def __init__(self, init: float = 2.0, tau: float = 1.0, samples: int = 1) -> None:
        super().__init__(_checks.finite("init", init))
        self.tau = temperature(tau)
        self.samples = _checks.count("samples", samples)

    def learned_options(self) -> dict[str, Any]:
        return {"method": "gumbel", "tau": self.tau, "samples": self.samples}

    def bits_now(self) -> Tensor:
        return ops.pack(self.own_scores(), 0.0)

    def expected_density(self) -> Tensor:
        """Mean of sigmoid(logit): the share of weights a draw activates, 0-d, differentiable."""
        return torch.sigmoid(self.own_scores()).mean()

    def settings(self) -> dict[str, Any]:
        return {"init": self.init, "tau": self.tau, "samples": self.samples}
