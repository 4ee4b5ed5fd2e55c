"""Stage 1: train the head on the source, and keep what it was before."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.errors import TrainingDiverged
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import Head

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """A source-trained head, in `initial` before stage 1 and in `trained` after it.

    Attributes:
        domain, seed: what it was trained on.
        head: holds the trained values; stages that train take a copy.
        initial, trained: parameters by name, copies.
        loss: mean training loss of the last 50 steps, in nats.
    """

    domain: str
    seed: int
    head: Head
    initial: Values
    trained: Values
    loss: float


def train(config: Config, domain: str, part: Part, classes: int, seed: int) -> Source:
    """Minimise the cross-entropy by Adam, `source_lr / sqrt(fan_in)` a step (`hidden_lr` in a hidden layer).

    Args:
        config: settings of stage 1.
        domain: the source's name.
        part: its training rows, on the device to train on.
        classes: how many there are.
        seed: of the initial values and the batches.

    Raises:
        TrainingDiverged: the loss is not finite; names domain, seed and step.

    Source: arXiv 2308.13957, 6; the optimizer is not stated there.
    """
    head = Head(
        part.x.shape[1], classes, config.hidden, config.scaling, generator(seed, "initial", domain)
    ).to(part.x)
    head.fit(part.x)
    initial = values(head)
    inputs = head.inputs(part.x)
    steps = {"hidden": config.hidden_lr, "output": config.source_lr}
    optimizer = torch.optim.Adam(
        [
            {"params": layer.parameters(), "lr": steps[name] / math.sqrt(layer.in_features)}
            for name, layer in head.named_children()
            if isinstance(layer, nn.Linear)
        ]
    )
    losses = []
    draws = generator(seed, "source", domain)
    for step, rows in enumerate(orders(len(part.y), config.batch, config.source_steps, draws)):
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(inputs[rows]), part.y[rows])
        losses.append(finite(loss, f"source {domain}, seed {seed}", step))
        loss.backward()
        optimizer.step()
    head.requires_grad_(False)
    return Source(domain, seed, head, initial, values(head), sum(losses[-50:]) / len(losses[-50:]))


def values(head: Head) -> Values:
    """Copies of all parameters by name."""
    return {name: param.detach().clone() for name, param in head.named_parameters()}


def with_values(head: Head, new: Values) -> Head:
    """A copy of the head that holds `new`."""
    made = copy.deepcopy(head)
    with torch.no_grad():
        for name, param in made.named_parameters():
            param.copy_(new[name])
    return made


def finite(loss: Tensor, run: str, step: int) -> float:
    """The loss as a number; raise TrainingDiverged where it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingDiverged(f"{run}: the loss is {value} at step {step + 1}")
    return value
