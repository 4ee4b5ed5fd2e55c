"""The backbone and the head as one network, of which chosen layers, norms by policy and the head learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import Tensor, nn

from fastmask.backbones import Transform
from fastmask.nn import (
    batch_norm_state_dict,
    load_batch_norm_state_dict,
    set_batch_norm_policy,
)
from fastmask.nn.support import is_weighted, read_by_parents, why_not
from fastmask.transfer.config import Policy
from fastmask.transfer.head import Head

Values = dict[str, Tensor]

# The head's masked layer by its name in a Network.
OUTPUT = "head.output"
# Pictures that go through a network at once outside of training.
_AT_ONCE = 64
# Layers that a refusal names.
_NAMED = 40


class Network(nn.Module):
    """Classify pictures: `head(scale(backbone(picture)))`; in evaluation mode but for norms that learn.

    What comes before the first layer that learns is the stem: it is the same for a picture all along, so
    that `hold` computes it once and `forward` starts behind it. A backbone that is no `nn.Sequential` has
    no stem: what lies before a layer cannot be told from outside.

    Args:
        backbone: the pretrained network without its classifier; taken over, and frozen.
        transform: what its pictures go through.
        layers: names of its linear layers and convolutions that learn and are masked.
        head: the classifier of its features.
        policy: what becomes of its batch norms.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        layers: tuple[str, ...],
        head: Head,
        policy: Policy,
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.head = head
        self.transform = transform
        self.layers = layers
        self.policy = policy
        record = set_batch_norm_policy(backbone, policy)
        self.norms, self.norms_in_words = record.norms, repr(record)
        self.requires_grad_(False)
        learned = (*layers, *(self.norms if policy != "frozen" else ()))
        self._stem, self._tail = _cut(backbone, learned)

    @property
    def masked(self) -> tuple[str, ...]:
        """Names of the layers with a mask, in order, the head's output layer last."""
        return (*(f"backbone.{name}" for name in self.layers), OUTPUT)

    @property
    def own_norms(self) -> tuple[str, ...]:
        """Names of the norms that learn."""
        found = () if self.policy == "frozen" else self.norms
        return tuple(f"backbone.{name}" for name in found)

    def learned(self) -> dict[str, nn.Module]:
        """The modules that stage 1 trains, by name."""
        heads = {f"head.{name}": layer for name, layer in self.head.named_children()}
        names = (*self.masked[:-1], *self.own_norms)
        return {name: self.get_submodule(name) for name in names} | heads

    def parameters_of(self, masked_alone: bool) -> dict[str, nn.Parameter]:
        """What is trained, by name: weights with a mask and the norms' parameters, or all of `learned`."""
        found = {
            f"{name}.{key}": param
            for name, module in self.learned().items()
            for key, param in module.named_parameters(recurse=False)
        }
        norms = self.own_norms
        return {
            name: param
            for name, param in found.items()
            if not masked_alone
            or name.rpartition(".")[0] in norms
            or name in (f"{layer}.weight" for layer in self.masked)
        }

    def values(self) -> Values:
        """Copies of every tensor that any stage may change, by name."""
        state = self.state_dict()
        modules = (*self.learned(), "head")
        return {
            name: value.clone()
            for name, value in state.items()
            if name.rpartition(".")[0] in modules
        }

    def moved_by_stage_3(self, train_unmasked: bool) -> tuple[str, ...]:
        """Names of every tensor that fine-tuning may change, frozen entries aside."""
        return (*self.parameters_of(not train_unmasked), *self.moving_statistics())

    def moving_statistics(self) -> tuple[str, ...]:
        """Names of the norms' buffers that training moves."""
        moving = self.own_norms if self.policy in ("per_task", "shared") else ()
        return tuple(name for name, _ in self.named_buffers() if name.rpartition(".")[0] in moving)

    def take_norms(self, values: Values) -> None:
        """Put back what of the norms is a task's own, from the values of that task."""
        if self.policy in ("affine", "per_task"):
            state = batch_norm_state_dict(self.backbone)
            load_batch_norm_state_dict(
                self.backbone, {name: values[f"backbone.{name}"] for name in state}
            )

    def with_values(self, new: Values) -> Network:
        """A copy of the network that holds `new`, and otherwise what this one holds."""
        made = copy.deepcopy(self)
        state = made.state_dict()
        with torch.no_grad():
            for name, value in new.items():
                state[name].copy_(value)
        return made

    def learning(self, now: bool) -> None:
        """Put the norms whose statistics move into training mode, or out of it; nothing else ever is."""
        for name in self.own_norms:
            self.get_submodule(name).train(now)

    def hold(self, pictures: Tensor) -> Tensor:
        """What `forward` reads of uint8 pictures (n, 3, size, size): the stem's outputs, or themselves."""
        if not self._stem:
            return pictures
        return batched(self._run_stem, pictures)

    def features(self, held: Tensor) -> Tensor:
        """Features (n, dim) of what `hold` returned."""
        x = held if self._stem else self.transform.scaled(held)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self._run(self._tail, x)

    def forward(self, held: Tensor) -> Tensor:
        """Logits (n, classes) of what `hold` returned."""
        logits: Tensor = self.head(self.head.inputs(self.features(held)))
        return logits

    def _run_stem(self, pictures: Tensor) -> Tensor:
        x = self.transform.scaled(pictures).contiguous(memory_format=torch.channels_last)
        return self._run(self._stem, x).contiguous()

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        if not self._stem:
            whole: Tensor = self.backbone(x)
            return whole
        for name in names:
            x = self.backbone.get_submodule(name)(x)
        return x


def choose(backbone: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers and convolutions whose name, or that of a module around them, fits a pattern.

    Raises:
        ValueError: a pattern fits none; or one cannot take a mask.
    """
    known = {name: layer for name, layer in backbone.named_modules() if name and is_weighted(layer)}
    chosen = set()
    for pattern in patterns:
        fitting = {name for name in known if any(fnmatchcase(n, pattern) for n in _around(name))}
        if not fitting:
            named = [*known][:_NAMED] + (
                [f"and {len(known) - _NAMED} more"] if len(known) > _NAMED else []
            )
            raise ValueError(
                "layers: expected names or patterns of the backbone's linear layers and convolutions "
                f"({', '.join(named)}), got {pattern!r}"
            )
        chosen |= fitting
    readers = read_by_parents(backbone)
    for name in known:
        reason = readers.get(known[name]) or why_not(known[name])
        if name in chosen and reason is not None:
            raise ValueError(f"layers: {name} cannot be masked: {reason}")
    return tuple(name for name in known if name in chosen)


def batched(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` a few rows at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([function(rows) for rows in x.split(_AT_ONCE)])


def accuracy(network: nn.Module, held: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is their label's."""
    return int((batched(network, held).argmax(1) == labels).sum()) / len(labels)


def size(module: nn.Module) -> float:
    """Root mean square of a layer's weight, or of a norm's scale: the unit of a step of Adam."""
    return math.sqrt(float(_weight(module).square().mean()))


def area(module: nn.Module) -> float:
    """Mean squared length of the weights of one unit: the unit of a learning rate of SGD.

    With w scaled by c and the function unchanged, as before a norm, gradients are scaled by 1 / c: the
    step that turns w by the same angle is c^2 as long.
    """
    return float(_weight(module).flatten(1).square().sum(1).mean())


def groups(
    params: Mapping[str, nn.Parameter],
    network: Network,
    of_head: Callable[[str], float],
    of_layer: Callable[[nn.Module], float],
) -> list[dict[str, object]]:
    """An optimizer's groups, one a module: `of_head(name)` in the head, `of_layer(module)` elsewhere."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, param in params.items():
        found.setdefault(name.rpartition(".")[0], []).append(param)
    return [
        {
            "params": listed,
            "lr": of_head(name)
            if name.startswith("head.")
            else of_layer(network.get_submodule(name)),
        }
        for name, listed in found.items()
    ]


def _weight(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach().double()
    return weight if weight.dim() > 1 else weight[:, None]


def _around(name: str) -> list[str]:
    """A name and those of the modules around it: a, a.b, a.b.c."""
    return list(accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}"))


def _cut(backbone: nn.Module, learned: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the children that come before the first one that learns, and of the others."""
    children = [name for name, _ in backbone.named_children()]
    if type(backbone).forward is not nn.Sequential.forward or not learned:
        return (), tuple(children)
    first = min(children.index(name.partition(".")[0]) for name in learned)
    return tuple(children[:first]), tuple(children[first:])
