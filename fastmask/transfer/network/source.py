"""Stage 1: train the head and the chosen layers on the source, end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import redraw
from fastmask.transfer.network.model import Network, Values, batched, groups, size
from fastmask.transfer.source import finite


@dataclass(frozen=True, eq=False)
class Source:
    """A source-trained network: what it holds beside the backbone's own, before stage 1 and after it.

    Attributes:
        domain, seed: what it was trained on.
        initial, trained: every tensor that a stage may change, by name, copies.
        loss: mean training loss of the last 50 steps, in nats.
    """

    domain: str
    seed: int
    initial: Values
    trained: Values
    loss: float


def train(config: Config, base: Network, domain: str, part: Part, seed: int) -> Source:
    """Minimise the cross-entropy by Adam from the pretrained values and a fresh head.

    The head steps as it does on features alone; a layer of the backbone `layers_lr` times the root mean
    square of its weight (a norm, of its scale). Norms are treated by their policy.

    Args:
        config: settings of stage 1.
        base: the network with the backbone's values; it stays as it is.
        domain: the source's name.
        part: its training rows, as the network holds them.
        seed: of the head's initial values and the batches.

    Raises:
        TrainingDiverged: the loss is not finite; names domain, seed and step.

    Source: arXiv 2308.13957, 6; the optimizer is not stated there.
    """
    network = base.with_values({})
    redraw(network.head, generator(seed, "initial", domain))
    network.head.fit(batched(network.features, part.x))
    initial = network.values()
    steps = {"head.hidden": config.hidden_lr, "head.output": config.source_lr}

    def of_head(name: str) -> float:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return steps[name] / math.sqrt(layer.in_features)

    trained = network.parameters_of(masked_alone=False)
    for param in trained.values():
        param.requires_grad_(True)
    optimizer = torch.optim.Adam(
        groups(trained, network, of_head, lambda module: config.layers_lr * size(module))
    )
    network.learning(True)
    losses = []
    draws = generator(seed, "source", domain)
    for step, rows in enumerate(orders(len(part.y), config.batch, config.source_steps, draws)):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(part.x[rows]), part.y[rows])
        losses.append(finite(loss, f"source {domain}, seed {seed}", step))
        loss.backward()
        optimizer.step()
    return Source(domain, seed, initial, network.values(), sum(losses[-50:]) / len(losses[-50:]))
