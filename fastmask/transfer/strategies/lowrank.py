"""The low-rank mask: edit the lower singular values of W; freeze the entries that this moves least."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import ops
from fastmask.bits import BitMask
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import editor
from fastmask.transfer.strategies.found import Found


def find(config: Config, source: Source, part: Part) -> Found:
    """Minimise the editor's objective over `dW = U_low diag(c) V_low^T`; freeze the smallest |dW|.

    With `W = U S V^T`, the leading directions, the fewest with `lowrank_energy` of sum s^2, keep their
    singular values and vectors; the others, at least one, take an edit c of their singular value. That
    is one number for each, at most min(N, K), where the editor has N * K. Bounds, tolerance, beta and its
    units are the editor's; an edit out of bounds is scaled back whole, so that it stays in its directions.

    What is frozen are entries, one bit each, and no set of entries is a set of directions: the
    `editor_share` of entries that the edit moves least is frozen, those which the lower directions reach
    least. A free entry has a component along the leading directions too, and stage 3 may move it: they
    are held in part, in the entries with `lead_kept` of the sum of squares of their part of W. The
    editor's rule `std` is not used: how much it freezes hangs on how many directions are left to edit.

    Args:
        config: settings named `editor_*`, but for the rule and its k, and `lowrank_energy`.
        source: the source-trained head.
        part: its training rows.

    Raises:
        TrainingDiverged: the loss is not finite.

    Source: arXiv 2308.13957, 7 ("the highest eigenvalues are kept fixed, while we allow edits on the lower
        eigenvalue decomposition"); the paper does not say how an edit becomes a mask.
    """
    weight = source.trained[MASKED]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    lead = leading(values, config.lowrank_energy)
    low_left, low_right = left[:, lead:], right[lead:]
    cap = config.editor_cap * float(weight.std())

    def edit_of(c: Tensor) -> Tensor:
        return (low_left * c) @ low_right

    def hold(c: Tensor) -> None:
        most = float(edit_of(c).abs().max())
        if most > cap:
            c.mul_(cap / most)

    shape = values[lead:].shape
    edit, notes = editor.learn("lowrank", config, source, part, shape, edit_of, hold)
    frozen = BitMask(ops.topk_mask(-edit.abs(), config.editor_share), weight.shape)
    square = ((left[:, :lead] * values[:lead]) @ right[:lead]).square()
    held = float(square[frozen.to_bool()].sum()) / max(float(square.sum()), 1e-30)
    return Found(frozen, edit, {**notes, "directions_kept": lead, "lead_kept": held})


def leading(values: Tensor, energy: float) -> int:
    """The fewest leading singular values that hold `energy` of the sum of squares; never the last one."""
    square = values.square()
    below = square.cumsum(0) < energy * square.sum()
    return min(int(below.sum()) + 1, len(values) - 1)
