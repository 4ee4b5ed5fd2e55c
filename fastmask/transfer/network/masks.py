"""Stage 2 for several layers: each strategy's masks of all masked layers."""

from __future__ import annotations

from fastmask.transfer.batches import generator
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.network import edited, learned
from fastmask.transfer.network.found import FoundMasks
from fastmask.transfer.network.model import Network
from fastmask.transfer.network.source import Source
from fastmask.transfer.strategies import magnitude, naive, random


def find(config: Config, strategy: str, base: Network, source: Source, part: Part) -> FoundMasks:
    """The masks of a strategy, each by its own rule (see fastmask.transfer.strategies).

    Args:
        config: settings.
        strategy: its name.
        base: the network with the backbone's values.
        source: the source-trained values.
        part: the source's training rows, as the network holds them.
    """
    if strategy in ("binary", "kl"):
        return learned.find(config, strategy, base, source, part)
    if strategy == "editor":
        return edited.find(config, base, source, part)
    weights = {f"{name}.weight": source.trained[f"{name}.weight"] for name in base.masked}
    if strategy == "naive":
        return FoundMasks(
            {name: naive.outliers(weight, config.naive_k) for name, weight in weights.items()}
        )
    share = magnitude.DENSITY if config.density is None else config.density
    if strategy == "magnitude":
        return FoundMasks(magnitude.masks(weights, share, config.scope))
    draws = generator(source.seed, "random mask", source.domain)
    return FoundMasks(random.masks(weights, share, config.scope, draws))
