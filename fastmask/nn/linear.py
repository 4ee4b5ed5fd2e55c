"""MaskedLinear: torch.nn.Linear with a mask over its weight."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fastmask.masks import Mask
from fastmask.nn.masked_layer import MaskedLayer


class MaskedLinear(MaskedLayer, nn.Linear):
    """Compute `x @ where(active, weight, 0).T + bias` with bits that a mask decides: `mask.linear`.

    In the place of `torch.nn.Linear`: same constructor order, same `weight` and `bias` keys; the mask is
    the submodule `mask`, so that `state_dict()` carries `mask.*` besides. A checkpoint with no `mask.*`
    key loads strictly and leaves the mask as it is. Under a learned mask the weight is taken for
    pretrained and frozen (`requires_grad=False`), under a `FixedMask` it is not; the bias is trainable.
    `train()` and `eval()` reach the mask: it samples, and learns, in training alone (`layer.mask.train()`
    after `model.eval()` learns a mask in a network that is otherwise in evaluation).

    Copies, pickles, `torch.save`, DDP and autocast take it as they take torch's layer. Compiled whole
    (`fullgraph=True`) it is one graph for all seeds and all bits copied or loaded into a `FixedMask`;
    `torch.export` takes it in evaluation. Checkpointing draws the same mask again (`preserve_rng_state`, the
    default). `torch.func` differentiates it backward, once, and maps it slice by slice; `randomness` of
    `vmap` says whether slices share a sampled mask. `AveragedModel` averages scores; its `use_buffers=True`
    would average packed bits as numbers and is not for networks with a `FixedMask`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias (N,).
        device: of the weight, the bias and the mask's scores.
        dtype: of the weight and the bias; scores are float32, and stay it under `.half()` and `.to(dtype)`.
        mask: a template (its settings are copied, with scores of its own) or the mask of an (N, K) weight.

    Raises:
        TypeError: `mask` is no mask.
        ValueError: the mask is of another shape or on another device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Mask,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._own(mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Mask) -> Self:
        """Return a masked layer that shares the parameters of a plain one, in its mode.

        Under a learned mask this freezes the shared weight. Hooks stay with the plain layer.

        Raises:
            TypeError: `linear` is a subclass, whose own forward would be lost, or `mask` is no mask.
            ValueError: the weight is no parameter of its own (weight_norm, prune); the mask does not fit.
        """
        return cls._adopt("linear", linear, nn.Linear, ("in_features", "out_features"), mask)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of input (..., K) through the masked weight, (..., N)."""
        return self.mask.linear(input, self.weight, self.bias)
