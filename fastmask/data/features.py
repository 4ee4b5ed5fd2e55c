"""Features of a frozen backbone: computed once, kept on disk, looked up afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastmask import _store
from fastmask.backbones import Backbone
from fastmask.data.domain_set import DomainSet, raise_faults
from fastmask.errors import DataError, WeightsError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Features:
    """A domain as a head sees it: x float32 (n, K), y int64 (n,), and rows of each part, int64."""

    x: Tensor
    y: Tensor
    train: Tensor
    test: Tensor
    val: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def extract(
    domains: DomainSet,
    backbone: Backbone,
    cache: str | Path | None = "auto",
    split_seed: int = 0,
    device: str | torch.device | None = None,
    *,
    holdout: float = 0.0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Features]:
    """Compute `backbone(transform(picture))` of every picture once.

    Args:
        domains: what to look at.
        backbone: frozen; `fastmask.backbones.load`.
        cache: folder that keeps the features, a file a domain, under a key of the pictures, the weights
            and the transform; "auto" is the user's own cache folder, None keeps nothing.
        split_seed: of `DomainSet.split`; nothing that is cached depends on it.
        device: where to compute; the backbone is moved there. None: where it lies.
        holdout: share of the training part to hold out as `val`.
        batch_size: pictures a forward pass.
        progress: called with a label, pictures done and pictures in all.

    Returns:
        domain -> Features, on the CPU.

    Raises:
        DataError: pictures that cannot be decoded, all of them named; nothing of their domain is kept.
        WeightsError: the backbone gives features that are not finite.

    Warns:
        CacheWarning: a damaged cache was found and is made again, or the cache cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if device is not None:
        backbone.module.to(device)
    found: dict[str, Features] = {}
    for index, domain in enumerate(domains.domains):
        split = domains.split(domain, split_seed, holdout)
        try:
            x = _features(domains, domain, backbone, cache, batch_size, progress)
        except _Undecodable as error:
            # One run names every file at fault: the domains that are left are decoded, not computed.
            faults = error.faults
            for later in domains.domains[index + 1 :]:
                faults += _faults(domains, later, progress)
            raise_faults(domains.name, faults)
        found[domain] = Features(x, domains.labels(domain), split.train, split.test, split.val)
    return found


def _features(
    domains: DomainSet,
    domain: str,
    backbone: Backbone,
    cache: str | Path | None,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """The features of one domain, from the cache where they lie in it."""
    key = {
        "pictures": domains.content(domain),
        "weights": backbone.fingerprint,
        "transform": backbone.transform.describe(),
    }

    def build() -> dict[str, Tensor]:
        return {"x": _compute(domains, domain, backbone, batch_size, progress)}

    return _store.fetch(cache, f"{backbone.name}-{domain}", key, build)["x"]


class _Undecodable(Exception):
    """Pictures of one domain that cannot be decoded."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults)
        self.faults = faults


def _compute(
    domains: DomainSet, domain: str, backbone: Backbone, batch_size: int, progress: Progress | None
) -> Tensor:
    total = len(domains.labels(domain))
    label = f"features of {domain}"
    rows, faults = [], []
    if progress:
        progress(label, 0, total)
    for done, batch in _decoded(domains, domain, batch_size):
        faults += [said for said in batch if isinstance(said, str)]
        if not faults:
            rows.append(
                backbone.features([picture for picture in batch if isinstance(picture, Tensor)])
            )
        if progress:
            progress(label, done, total)
    if faults:
        raise _Undecodable(faults)
    features = torch.cat(rows)
    wrong = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        raise WeightsError(
            f"{backbone.name} gives features that are not finite for {len(wrong)} of {total} pictures, "
            f"first {domains.item(domain, wrong[0])}"
        )
    return features


def _faults(domains: DomainSet, domain: str, progress: Progress | None) -> list[str]:
    total = len(domains.labels(domain))
    faults: list[str] = []
    for done, batch in _decoded(domains, domain, 64):
        faults += [said for said in batch if isinstance(said, str)]
        if progress:
            progress(f"checking {domain}", done, total)
    return faults


def _decoded(
    domains: DomainSet, domain: str, batch_size: int
) -> Iterator[tuple[int, list[Tensor | str]]]:
    """(pictures so far, batch); a picture that cannot be decoded is the sentence that says so."""

    def one(row: int) -> Tensor | str:
        try:
            return domains.image(domain, row)
        except DataError as error:
            return str(error)

    total = len(domains.labels(domain))
    starts = range(0, total, batch_size)
    # Pillow decodes outside the interpreter's lock: the next batch is read while the network is at work.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        ahead = [pool.submit(one, row) for row in range(0, min(batch_size, total))]
        for start in starts:
            waiting, stop = ahead, min(start + batch_size, total)
            ahead = [pool.submit(one, row) for row in range(stop, min(stop + batch_size, total))]
            yield stop, [future.result() for future in waiting]
