"""MaskedMultiheadAttention: torch.nn.MultiheadAttention with masks over its projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastmask.masks import Mask

ATTRIBUTES = (
    "embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "dropout", "batch_first",
    "head_dim", "add_zero_attn",
)  # fmt: skip


class AttentionMasks(nn.ModuleDict):
    """The masks of an attention's projections by name, of which a checkpoint has all or none."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        own = {name: f"{prefix}{name}." for name in self}
        absent = [name for name in own if not any(key.startswith(own[name]) for key in state_dict)]
        if len(absent) < len(own) or not prefix:
            missing_keys += [own[name] + key for name in absent for key in self[name].state_dict()]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *lists
        )


class MaskedMultiheadAttention(nn.MultiheadAttention):
    """Attend as `torch.nn.MultiheadAttention` does, each projection through its masked weight.

    In the place of torch's own: same constructor order, same keys. `attention.mask` holds a mask for each
    weight: `in_proj` of `in_proj_weight` (3 E, E), or `q_proj`, `k_proj` and `v_proj` where `kdim` or
    `vdim` differ, and `out_proj` of `out_proj.weight` (E, E); `state_dict()` carries `mask.in_proj.*` and so
    on besides. What `MaskedLinear` says of masks, checkpoints, frozen weights, `train()` and `eval()` holds
    here too. Masks of S samples take S equal groups of consecutive sequences of the batch.

    The forward is torch's own, fast path included, on the masked weights: under masks of ones it has the
    bits of torch's, whose weights require gradients as the masked ones do (torch sums in another order
    where `batch_first` meets a frozen weight on the slow path; a learned mask freezes it in evaluation).
    Masked weights are made anew in each call: 4 E * E values, against B * L * 4 E * E products.

    Args:
        embed_dim: E.
        num_heads: number of heads; divides E.
        dropout: of attention weights, in training.
        bias: whether the projections have biases.
        add_bias_kv: whether a learned key and value are added to each sequence.
        add_zero_attn: whether a key and a value of zeros are added.
        kdim: features of the keys; E by default.
        vdim: features of the values; E by default.
        batch_first: whether inputs are (B, L, E) and not (L, B, E).
        device: of parameters and scores.
        dtype: of parameters; scores are float32, and stay it under `.half()` and `.to(dtype)`.
        mask: a template for all projections, or the masks by name: templates, or of the weights' shapes.

    Raises:
        TypeError: `mask` is no mask and no mapping of masks.
        ValueError: a mask is of another shape or on another device; a name is missing or unknown.
    """

    mask: AttentionMasks

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Mask | Mapping[str, Mask],
    ) -> None:
        nn.MultiheadAttention.__init__(
            self, embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self._own(mask)

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, mask: Mask | Mapping[str, Mask]
    ) -> Self:
        """Return a masked layer that shares the parameters of a plain one, in its mode.

        Under learned masks this freezes the shared weights. Hooks stay with the plain layer.

        Raises:
            TypeError: `attention` is a subclass, whose own forward would be lost, or `mask` is no mask.
            ValueError: a weight is no parameter of its own; a mask does not fit or has no weight.
        """
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(
                "attention: expected a plain torch.nn.MultiheadAttention (what a subclass computes would "
                f"be lost), got {type(attention).__name__}"
            )
        for owner, key in projections(attention).values():
            if key not in owner._parameters:
                raise ValueError(
                    f"attention: expected {key} to be a parameter, found it computed from others "
                    "(weight_norm or torch.nn.utils.prune: remove it first)"
                )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for attribute in ATTRIBUTES:
            setattr(layer, attribute, getattr(attention, attribute))
        layer.bias_k = layer.bias_v = None
        for key, parameter in attention._parameters.items():
            layer.__dict__.pop(key, None)
            layer.register_parameter(key, parameter)
        layer.out_proj = attention.out_proj
        layer._own(mask)
        return layer.train(attention.training)

    def _own(self, mask: Any) -> None:
        """Take masks, or make them from templates, and freeze the weights of those that learn."""
        places = projections(self)
        given = dict(mask) if isinstance(mask, Mapping) else dict.fromkeys(places, mask)
        if given.keys() != places.keys():
            raise ValueError(f"mask: expected masks named {list(places)}, got {list(given)}")
        for own in given.values():
            if not isinstance(own, Mask):
                raise TypeError(f"mask: expected a fastmask mask, got {type(own).__name__}")
        masks = {
            name: given[name].for_weight(owner.get_parameter(key))
            for name, (owner, key) in places.items()
        }
        self.mask = AttentionMasks(masks)
        for name, (owner, key) in places.items():
            if masks[name].freezes_weight:
                owner.get_parameter(key).requires_grad_(False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences through the masked projections, as `torch.nn.MultiheadAttention.forward`."""
        weights = {
            name: self._mask(name).effective(getattr(owner, parameter))
            for name, (owner, parameter) in projections(self).items()
        }
        samples = max(len(each) for each in weights.values())
        if {len(each) for each in weights.values()} - {1, samples}:
            counts = {name: len(each) for name, each in weights.items()}
            raise ValueError(f"mask: expected one number of samples in all masks, got {counts}")
        how = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        inputs = (query, key, value, key_padding_mask, attn_mask)
        parts = [inputs] if samples == 1 else _parts(samples, self.batch_first, *inputs)
        results = []
        for i, (q, k, v, padding, attention) in enumerate(parts):
            # What torch's forward reads of itself, the weights being those of sample i.
            itself: Any = _Read(self, weights, i)
            results.append(
                nn.MultiheadAttention.forward(
                    itself, q, k, v, key_padding_mask=padding, attn_mask=attention,
                    is_causal=is_causal, **how,
                )
            )  # fmt: skip
        if samples == 1:
            return results[0]
        out = torch.cat([output for output, _ in results], 0 if self.batch_first else 1)
        return out, torch.cat([w for _, w in results if w is not None]) if need_weights else None

    def _mask(self, name: str) -> Mask:
        mask = self.mask[name]
        assert isinstance(mask, Mask)
        return mask


class _Read:
    """An attention with the masked weights of a sample in the place of its own."""

    def __init__(self, layer: nn.MultiheadAttention, weights: dict[str, Tensor], i: int) -> None:
        own = {name: each[min(i, len(each) - 1)] for name, each in weights.items()}
        self.layer = layer
        self.in_proj_weight = own.get("in_proj")
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (
            own.get(f"{name}_proj") for name in "qkv"
        )
        self.out_proj = _Projection(own["out_proj"], layer.out_proj.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Projection:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias


def projections(attention: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the weights of an attention lie: by the name of the mask, the module and its parameter."""
    packed = attention._qkv_same_embed_dim
    names = ("in_proj",) if packed else ("q_proj", "k_proj", "v_proj")
    out_proj = attention.out_proj
    assert isinstance(out_proj, nn.Module)
    return {
        **{name: (attention, f"{name}_weight") for name in names},
        "out_proj": (out_proj, "weight"),
    }


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _parts(
    samples: int,
    batch_first: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> list[Inputs]:
    """The inputs of each sample: equal groups of consecutive sequences, what was one tensor still one."""
    dim = 0 if batch_first else 1
    if query.dim() != 3 or query.shape[dim] % samples:
        raise ValueError(
            f"query: expected a batch that the {samples} samples of the masks divide, got shape "
            f"{tuple(query.shape)} with batch_first={batch_first}"
        )
    q = query.chunk(samples, dim)
    k = q if key is query else key.chunk(samples, dim)
    v = q if value is query else k if value is key else value.chunk(samples, dim)
    none = (None,) * samples
    padding = none if key_padding_mask is None else key_padding_mask.chunk(samples)
    # One mask of attention for all sequences, or one for each head of each.
    attention = (attn_mask,) * samples
    if attn_mask is not None and attn_mask.dim() == 3:
        attention = attn_mask.chunk(samples)
    return list(zip(q, k, v, padding, attention, strict=True))
