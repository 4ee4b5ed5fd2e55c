"""restore_frozen_: put frozen entries back after an optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _lists, _tables
from fastmask.ops._register import register


def restore_frozen_(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    frozen: Sequence[Tensor | None] | None,
    *,
    backend: str = "auto",
) -> None:
    """Write saved values back where frozen: `theta = where(frozen, saved, theta)`, in place.

    Entries are copied as they are, so that NaN and -0.0 come back bit for bit; free entries are not
    changed.

    Args:
        params: n tensors of one floating dtype and device, updated.
        saved: n tensors like params.
        frozen: n packed masks, uint8 (bytes,), 1 = frozen, or None for each; None = nothing is frozen.
        backend: `auto` or the name of a back end.

    Raises:
        TypeError, ValueError: lists of different lengths; dtype, device or shape do not fit.
        BackendUnavailable: the back end named cannot run.

    Gradients: none; params may require grad.
    Deterministic: yes.
    """
    if plain := _tables.plain("restore_frozen_", backend, params, (saved,), frozen):
        module, rows = plain
        module.restore_frozen_(params, saved, frozen, rows)
        return
    _lists.updated(params)
    _lists.alike("saved", saved, params)
    bits = _lists.frozen_bits(frozen, params)
    if not params:
        return
    with torch.no_grad():
        torch.ops.fastmask.restore_frozen_(list(params), list(saved), bits, backend)


def _implementation(
    params: list[Tensor], saved: list[Tensor], frozen: list[Tensor | None], backend: str
) -> None:
    module = _backend.resolve("restore_frozen_", backend, params[0].device)
    module.restore_frozen_(params, saved, frozen)


def _fake(*_: object) -> None:
    return None


register(
    "restore_frozen_(Tensor(a!)[] params, Tensor[] saved, Tensor?[] frozen, str backend) -> ()",
    _implementation,
    _fake,
)
