"""The pictures a sweep over layers works on, as its network holds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmask.backbones import Transform
from fastmask.data import DomainSet
from fastmask.data.domain_set import raise_faults
from fastmask.errors import DataError
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain, Part
from fastmask.transfer.progress import Progress, say


def load(
    config: Config,
    domains: DomainSet,
    transform: Transform,
    hold: Callable[[Tensor], Tensor],
    progress: Progress | None,
) -> dict[str, Domain]:
    """Decode and hold the pictures of the domains that a sweep uses, cut into its parts.

    Args:
        config: its domains, split and device.
        domains: the data set.
        transform: of the backbone; pictures are held in its size.
        hold: what is kept of uint8 pictures (n, 3, size, size), called on the device.
        progress: called with a label, pictures done and pictures in all.

    Raises:
        DataError: pictures that cannot be decoded, all of them named, or a part without pictures.
    """
    used = {name for pair in config.pairs(domains.domains) for name in pair}
    found, faults = {}, []
    for name in (name for name in domains.domains if name in used):
        y = domains.labels(name)
        pictures = []
        for row in range(len(y)):
            if row % 64 == 0:
                say(progress, f"pictures of {name}", row, len(y))
            try:
                pictures.append(transform.sized(domains.image(name, row)))
            except DataError as error:
                faults.append(str(error))
        say(progress, f"pictures of {name}", len(y), len(y))
        if faults:
            continue
        x, y = hold(torch.stack(pictures).to(config.device)), y.to(config.device)
        split = domains.split(name, config.split_seed, config.holdout)
        test = split.val if config.holdout else split.test
        if len(test) == 0:
            raise DataError(f"{name}: its {'val' if config.holdout else 'test'} part has no rows")
        train = split.train
        found[name] = Domain(Part(x[train], y[train]), Part(x[test], y[test]))
    raise_faults(domains.name, faults)
    return found
