"""The KL mask: learn which weights the source head's outputs need, without its labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import binary
from fastmask.transfer.strategies.found import Found


def find(config: Config, source: Source, part: Part) -> Found:
    """Minimise `KL(softmax(Wx + b) || softmax((B * W)x + b)) + beta * sum(l)` over logits l; freeze the kept.

    The mean is over the source's rows; everything but the loss is the binary mask's: samples, gradients,
    units of beta, bounds, and what is frozen. Labels are not needed and not looked at.

    Args:
        config: settings from `tau` to `density`.
        source: the source-trained head; its weights stay as they are.
        part: its training rows, at least `samples`.

    Raises:
        TrainingDiverged: the loss or a logit's gradient is not finite.

    Warns:
        MaskWarning: `l > 0` freezes nothing or everything, or over half of the logits are at their bound.

    Source: arXiv 2308.13957, 7 ("the output distribution before and after masking are close").
    """
    inputs = source.head.last_input(source.head.inputs(part.x))
    weight, bias = source.trained[MASKED], source.trained["output.bias"]
    unmasked = functional.log_softmax(functional.linear(inputs, weight, bias), 1)

    def divergence(out: Tensor, rows: Tensor) -> Tensor:
        masked = functional.log_softmax(out, 1)
        return functional.kl_div(masked, unmasked[rows], reduction="batchmean", log_target=True)

    return binary.learn("kl", config, source, part, divergence)
