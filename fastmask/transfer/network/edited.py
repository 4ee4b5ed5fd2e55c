"""The editor mask of several layers at once: how far their weights can be edited with the source kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.network.found import FoundMasks
from fastmask.transfer.network.model import Network, batched
from fastmask.transfer.network.source import Source
from fastmask.transfer.source import finite
from fastmask.transfer.strategies.editor import EVERY, ROWS, least_edited
from fastmask.transfer.strategies.found import RunningMean


def find(config: Config, base: Network, source: Source, part: Part) -> FoundMasks:
    """Minimise `keep(W + dW) + beta * sum |dW|` over the edits of all masked layers; freeze the least edited.

    As for a head alone: each layer's step, first edit and bound are in units of its own std(W), beta in
    units of its own |dCE/ddW|, and the rule is applied to each by itself.

    Args:
        config: settings named `editor_*`.
        base: the network with the backbone's values.
        source: the source-trained values.
        part: its training rows, as the network holds them.

    Raises:
        TrainingDiverged: the loss is not finite.

    Warns:
        MaskWarning: the rule freezes nothing of a layer.

    Source: arXiv 2308.13957, 5.2.
    """
    run = f"editor mask of {source.domain}, seed {source.seed}"
    network = base.with_values(source.trained)
    unedited = batched(lambda x: functional.log_softmax(network(x), 1), part.x)
    weights = {f"{name}.weight": source.trained[f"{name}.weight"] for name in network.masked}

    def outputs(edits: Mapping[str, Tensor], x: Tensor) -> Tensor:
        edited = {name: weight + edits[name] for name, weight in weights.items()}
        logits: Tensor = functional_call(network, edited, (x,))
        return logits

    def keep(logits: Tensor, rows: Tensor) -> Tensor:
        if config.editor_preserve == "ce":
            return functional.cross_entropy(logits, part.y[rows])
        now = functional.log_softmax(logits, 1)
        return functional.kl_div(now, unedited[rows], reduction="batchmean", log_target=True)

    draws = generator(source.seed, "editor", source.domain)
    spreads = {name: float(weight.std()) for name, weight in weights.items()}
    edits = {
        name: nn.Parameter(
            torch.randn(weight.shape, generator=draws).to(weight)
            * (config.editor_init * spreads[name])
        )
        for name, weight in weights.items()
    }
    optimizer = torch.optim.Adam(
        [
            {"params": [edit], "lr": config.editor_lr * spreads[name]}
            for name, edit in edits.items()
        ],
        eps=1e-12,
    )
    scales = {name: RunningMean() for name in edits}
    everything = torch.randperm(len(part.y), generator=draws)[:ROWS]
    looked_at = part.x[everything]

    def whole(edits: Mapping[str, Tensor], step: int) -> float:
        return finite(keep(batched(lambda x: outputs(edits, x), looked_at), everything), run, step)

    def copies() -> dict[str, Tensor]:
        return {name: edit.detach().clone() for name, edit in edits.items()}

    before = whole({name: torch.zeros_like(edit) for name, edit in edits.items()}, 0)
    within, steps, loss = copies(), 0, before
    order = orders(len(part.y), config.batch, config.editor_steps, draws)
    for step, rows in enumerate(order):
        optimizer.zero_grad()
        batch_loss = keep(outputs(edits, part.x[rows]), rows)
        finite(batch_loss, run, step)
        batch_loss.backward()
        for name, edit in edits.items():
            assert edit.grad is not None
            slope = float(edit.grad.abs().mean())
            unit = 1.0 if config.editor_beta_unit == "absolute" else scales[name](slope)
            edit.grad.add_(edit.detach().sign(), alpha=config.editor_beta * unit)
        optimizer.step()
        with torch.no_grad():
            for name, edit in edits.items():
                bound = config.editor_cap * spreads[name]
                edit.clamp_(-bound, bound)
        if (step + 1) % EVERY == 0 or step + 1 == config.editor_steps:
            now = whole(edits, step)
            if now > before + config.editor_tolerance:
                break
            within, steps, loss = copies(), step + 1, now
    frozen = {
        name: least_edited(edit.abs(), config, f"{run}, {name}") for name, edit in within.items()
    }
    notes = {"steps": steps, "loss_before": before, "loss": loss}
    return FoundMasks(frozen, within, notes)
