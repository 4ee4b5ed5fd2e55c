"""The CUDA engine's masked_sgd_: all tensors in one launch, steps in float32, rounded when stored."""

from __future__ import annotations

from torch import Tensor

from fastmask import _cuda
from fastmask.ops._launch import KINDS, address, place, rate
from fastmask.ops._tables import table, written_back

DTYPES = tuple(KINDS)


def masked_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    frozen: list[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """theta, buf unchanged where frozen; elsewhere buf = mu buf + (1 - damp) g, theta -= lr d."""
    number, on_device = rate(lr)
    with written_back(params, momenta) as (thetas, bufs):
        rows, _alive = table(thetas, grads, bufs or None, frozen)
        _cuda.masked_sgd_(
            rows.buffer_info()[0],
            len(thetas),
            KINDS[thetas[0].dtype],
            number,
            address(on_device),
            momentum,
            weight_decay,
            dampening,
            int(nesterov),
            int(maximize),
            int(first),
            *place(thetas[0]),
        )
