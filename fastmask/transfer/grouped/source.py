"""Stage 1 for several sources and seeds at once: one batched product a layer and step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.errors import TrainingDiverged
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import Head
from fastmask.transfer.source import Source, values

# What is trained: a domain's name, its training rows, a seed.
Problem = tuple[str, Part, int]


def train(config: Config, problems: Sequence[Problem], classes: int) -> list[Source]:
    """Do what `transfer.source.train` does for each of P problems; those with as many rows a step are one.

    Their losses are added, so that each problem's gradient is its own; Adam works entry by entry.

    Args:
        config: settings of stage 1.
        problems: what to train.
        classes: how many there are.

    Raises:
        TrainingDiverged: a loss is not finite; names domain, seed and step.
    """
    found: list[Source | None] = [None] * len(problems)
    sizes = [min(config.batch, len(part.y)) for _, part, _ in problems]
    for size in dict.fromkeys(sizes):
        places = [i for i, own in enumerate(sizes) if own == size]
        for i, source in zip(
            places, _train(config, [problems[i] for i in places], classes), strict=True
        ):
            found[i] = source
    return [source for source in found if source is not None]


def _train(config: Config, problems: Sequence[Problem], classes: int) -> list[Source]:
    heads = []
    for domain, part, seed in problems:
        draws = generator(seed, "initial", domain)
        head = Head(part.x.shape[1], classes, config.hidden, config.scaling, draws)
        head.to(part.x.device, part.x.dtype).fit(part.x)
        heads.append(head)
    initial = [values(head) for head in heads]
    stacked = {
        name: nn.Parameter(torch.stack([own[name] for own in initial])) for name in initial[0]
    }
    first = heads[0]
    steps = {"hidden": config.hidden_lr, "output": config.source_lr}
    optimizer = torch.optim.Adam(
        [
            {
                "params": [stacked[f"{name}.weight"], stacked[f"{name}.bias"]],
                "lr": steps[name] / math.sqrt(layer.in_features),
            }
            for name, layer in first.named_children()
            if isinstance(layer, nn.Linear)
        ]
    )
    rows = torch.cat(
        [head.inputs(part.x) for head, (_, part, _) in zip(heads, problems, strict=True)]
    )
    labels = torch.cat([part.y for _, part, _ in problems])
    losses = []
    for places in _places(config, problems):
        optimizer.zero_grad()
        x = rows[places].transpose(1, 2)
        if first.hidden is not None:
            hidden = first.scaled_hidden(_linear(stacked, "hidden", x).transpose(1, 2))
            x = hidden.transpose(1, 2)
        logits = _linear(stacked, "output", x)
        own = functional.cross_entropy(logits, labels[places], reduction="none").mean(1)
        losses.append(own.detach())
        own.sum().backward()
        optimizer.step()
    return _results(config, problems, heads, initial, stacked, torch.stack(losses))


def _places(config: Config, problems: Sequence[Problem]) -> list[Tensor]:
    """For each step the rows (P, B) of all problems' rows, one below the other."""
    found, offset = [], 0
    for domain, part, seed in problems:
        draws = generator(seed, "source", domain)
        order = orders(len(part.y), config.batch, config.source_steps, draws)
        found.append(torch.stack(list(order)) + offset)
        offset += len(part.y)
    return list(torch.stack(found, 1).to(problems[0][1].x.device).unbind())


def _linear(stacked: dict[str, nn.Parameter], name: str, x: Tensor) -> Tensor:
    """`W x + b` of each problem, columns (P, K, B) to (P, N, B): few long rows on the left are faster."""
    weight, bias = stacked[f"{name}.weight"], stacked[f"{name}.bias"]
    return torch.bmm(weight, x) + bias.unsqueeze(2)


def _results(
    config: Config,
    problems: Sequence[Problem],
    heads: Sequence[Head],
    initial: Sequence[dict[str, Tensor]],
    stacked: dict[str, nn.Parameter],
    losses: Tensor,
) -> list[Source]:
    found = []
    for p, (domain, _, seed) in enumerate(problems):
        finite = losses[:, p].isfinite()
        if not bool(finite.all()):
            step = int((~finite).nonzero()[0])
            raise TrainingDiverged(
                f"source {domain}, seed {seed}: the loss is {float(losses[step, p])} at step {step + 1}"
            )
        head = heads[p]
        with torch.no_grad():
            for name, param in head.named_parameters():
                param.copy_(stacked[name][p])
        head.requires_grad_(False)
        loss = float(losses[-50:, p].mean())
        found.append(Source(domain, seed, head, initial[p], values(head), loss))
    return found
