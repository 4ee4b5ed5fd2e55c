"""MaskedLayer: what every layer with a mask over its weight has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from fastmask.masks import Mask


class MaskedLayer(nn.Module):
    """A layer that owns a mask of its weight; stands before torch's own layer among the bases."""

    mask: Mask
    weight: Tensor

    def _own(self, mask: Any) -> None:
        """Take a mask, or one made from a template, and freeze the weight where the mask learns."""
        if not isinstance(mask, Mask):
            raise TypeError(f"mask: expected a fastmask mask, got {type(mask).__name__}")
        self.mask = mask.for_weight(self.weight)
        if mask.freezes_weight:
            self.weight.requires_grad_(False)

    @classmethod
    def _adopt(
        cls, name: str, plain: Any, kind: type[nn.Module], attributes: Sequence[str], mask: Any
    ) -> Self:
        """Return a layer with the parameters, the attributes and the mode of a plain one of a kind."""
        if type(plain) is not kind:
            raise TypeError(
                f"{name}: expected a plain torch.nn.{kind.__name__} (what a subclass computes would be "
                f"lost), got {type(plain).__name__}"
            )
        if "weight" not in plain._parameters:
            raise ValueError(
                f"{name}: expected weight to be a parameter, found it computed from others (weight_norm "
                "or torch.nn.utils.prune: remove it first)"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for attribute in attributes:
            setattr(layer, attribute, getattr(plain, attribute))
        for key, parameter in plain._parameters.items():
            layer.register_parameter(key, parameter)
        layer._own(mask)
        return layer.train(plain.training)
