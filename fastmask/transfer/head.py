"""The classifier on frozen features: a linear layer, or an MLP; its last layer is what masks are of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.transfer.config import Scaling

# The parameter that is masked: the paper's "final layer".
MASKED = "output.weight"
# Least spread of a feature under `standard`, as a share of the mean spread: a dead one is not blown up.
_LEAST_SPREAD = 1e-3
# Rows tested at once: scaled copies of a large domain are not held.
_ROWS = 4096


class Head(nn.Module):
    """Classify features: `output(scale(x))`, or `output(scale(relu(hidden(scale(x)))))`.

    Args:
        features: width K of the input.
        classes: width of the output.
        hidden: width of the hidden layer, or 0.
        scaling: what each layer's input goes through (see Config); means and spreads come from `fit`
            and apply to the features alone.
        draws: decides the initial values, uniform within 1 / sqrt(fan_in) as torch's own.
    """

    shift: Tensor
    spread: Tensor

    def __init__(
        self, features: int, classes: int, hidden: int, scaling: Scaling, draws: torch.Generator
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.hidden = nn.Linear(features, hidden) if hidden else None
        self.output = nn.Linear(hidden or features, classes)
        redraw(self, draws)

    def fit(self, x: Tensor) -> None:
        """Take means and spreads from the source's training features (n, K); `unit` and `none` need none."""
        if self.scaling in ("centred", "standard"):
            self.shift.copy_(x.mean(0))
        if self.scaling == "standard":
            spread = x.std(0, unbiased=False)
            least = max(_LEAST_SPREAD * float(spread.mean()), torch.finfo(x.dtype).tiny)
            self.spread.copy_(spread.clamp_min(least) * math.sqrt(x.shape[1]))

    def inputs(self, x: Tensor) -> Tensor:
        """Scale features (n, K); nothing here is learned by gradient, so that it is done once a run."""
        x = (x - self.shift) / self.spread
        return functional.normalize(x) if self.scaling in ("unit", "centred") else x

    def last_input(self, inputs: Tensor) -> Tensor:
        """What the output layer reads, from scaled features."""
        return inputs if self.hidden is None else self.scaled_hidden(self.hidden(inputs))

    def scaled_hidden(self, found: Tensor) -> Tensor:
        """What the output layer reads, (..., hidden), from what the hidden layer gives."""
        found = torch.relu(found)
        if self.scaling == "none":
            return found
        if self.scaling == "standard":
            return found / math.sqrt(found.shape[-1])
        return functional.normalize(found, dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) from scaled features (n, K), as `inputs` returns them."""
        logits: Tensor = self.output(self.last_input(inputs))
        return logits


def redraw(head: Head, draws: torch.Generator) -> None:
    """Draw all weights and biases, uniform within 1 / sqrt(fan_in)."""
    with torch.no_grad():
        for layer in head.children():
            if isinstance(layer, nn.Linear):
                bound = 1.0 / math.sqrt(layer.in_features)
                for param in (layer.weight, layer.bias):
                    drawn = torch.empty(param.shape).uniform_(-bound, bound, generator=draws)
                    param.copy_(drawn)


def accuracy(head: Head, x: Tensor, labels: Tensor) -> float:
    """Share of rows of features (n, K) whose largest logit is their label's."""
    right = 0
    with torch.no_grad():
        for rows, wanted in zip(x.split(_ROWS), labels.split(_ROWS), strict=True):
            right += int((head(head.inputs(rows)).argmax(1) == wanted).sum())
    return right / len(labels)
