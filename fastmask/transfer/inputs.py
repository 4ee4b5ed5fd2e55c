"""What a sweep works on: the device, the data and the backbone, and what environment.json says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from fastmask import backbones, data
from fastmask.backbones import Backbone
from fastmask.data import DomainSet, Features
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Domain
from fastmask.transfer.plan import Group
from fastmask.transfer.progress import Progress


def load(config: Config, progress: Progress | None) -> tuple[DomainSet, Backbone, dict[str, str]]:
    """The data, the backbone, and where they came from.

    Raises:
        DataError, WeightsError, MissingPackage: data or backbone cannot be used.
        ValueError: a domain of the settings is unknown.
    """
    domains = data.load(
        config.data, test_fraction=config.test_fraction, splits=config.splits, progress=progress
    )
    config.pairs(domains.domains)
    backbone = backbones.load(
        config.backbone_name, config.weights, config.device, cache=config.cache, progress=progress
    )
    said = {
        "data": domains.name,
        "data_fingerprint": domains.fingerprint,
        "backbone": backbone.name,
        "backbone_weights": backbone.weights,
        "backbone_fingerprint": backbone.fingerprint,
    }
    return domains, backbone, said


def fingerprint(features: Mapping[str, Features]) -> str:
    """What features given in memory are told apart by."""
    digest = hashlib.sha256()
    for name, given in features.items():
        digest.update(f"{name}\0{tuple(given.x.shape)}\0".encode())
        for tensor in (given.x, given.y, given.train, given.test, given.val):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_samples(config: Config, domains: Mapping[str, Domain], groups: tuple[Group, ...]) -> None:
    """Raise ValueError where a source has fewer rows than a batch has masks."""
    if not {"binary", "kl"} & set(config.strategies):
        return
    for name in dict.fromkeys(run.source for group in groups for run in group.runs):
        if (n := len(domains[name].train.y)) < config.samples:
            raise ValueError(
                f"samples: expected at most the {n} training rows of {name}, got {config.samples}"
            )


def device_of(name: str) -> torch.device:
    """The device of a name; raise ValueError where it does not work here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that works here, got {name!r} ({why})") from error
    return device
