"""The written surrogate of learned masks in plain torch: hard bits forward, their soft sample backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask import ops
from fastmask.ops.sample_mask import reference as sampling

SEED = 2026
# Every way to decide bits, with every way to read inactive weights and to scale.
VARIANTS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": SEED, "tau": 0.7},
    {"method": "gumbel", "seed": SEED, "samples": 3},
    {"method": "gumbel", "seed": SEED, "samples": 3, "tau": 2.0, "scale": "rsqrt_density"},
    {"method": "gumbel", "seed": SEED, "samples": 2, "off": "flip"},
    {"method": "threshold"},
    {"method": "threshold", "mu": -0.3, "off": "flip"},
    {"method": "threshold", "mu": 0.2, "scale": "rsqrt_density"},
    {"method": "topk", "density": 0.3},
    {"method": "topk", "density": 0.6, "off": "flip"},
    {"method": "topk", "density": 0.4, "scale": "rsqrt_density"},
]


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(
        str(variant[key]) for key in ("method", "samples", "off", "scale") if key in variant
    )


def bits_of(scores: Tensor, **options: Any) -> Tensor:
    """The bits (S, *scores.shape) that the ops proved elsewhere give."""
    if options["method"] == "gumbel":
        packed = ops.sample_mask(scores, options["seed"], options.get("samples", 1))
    elif options["method"] == "topk":
        packed = ops.topk_mask(scores, options["density"]).unsqueeze(0)
    else:
        packed = ops.pack(scores, options.get("mu", 0.0)).unsqueeze(0)
    return ops.unpack(packed, scores.shape)


def surrogate_weights(
    w: Tensor, scores: Tensor, *, relaxed: bool = False, **options: Any
) -> Tensor:
    """W' (S, *w.shape) of each sample, through which gradients reach the weight and the scores.

    With `relaxed` the soft sample stands in the forward too, so that it is a differentiable function.
    """
    hard = bits_of(scores.detach(), **options).to(torch.promote_types(scores.dtype, torch.float32))
    soft = scores.to(hard.dtype).expand_as(hard)
    if options["method"] == "gumbel":
        seed = torch.tensor(options["seed"])
        noise = sampling.noise(scores.numel(), seed, len(hard), 0, hard.dtype).view_as(hard)
        soft = torch.sigmoid((soft + noise) / options.get("tau", 1.0))
    b = soft if relaxed else (hard - soft).detach() + soft
    wide = torch.promote_types(w.dtype, torch.float32)
    flip = options.get("off") == "flip"
    effective = w.to(wide) * (2 * b - 1 if flip else b)
    if options.get("scale"):
        effective = effective / b.mean(dim=tuple(range(1, b.dim())), keepdim=True).sqrt()
    return effective.to(w.dtype)
