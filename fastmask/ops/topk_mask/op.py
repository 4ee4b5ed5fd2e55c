"""topk_mask: the bits of the largest scores, an exact number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register


def topk_mask(scores: Tensor, density: float, *, backend: str = "auto") -> Tensor:
    """Keep the k largest scores: `bit[e] = rank(scores[e]) < k`, `k = floor(density * n + 0.5)`.

    Among equal scores the lower index ranks first, so that exactly k bits are 1 however many are equal
    (0.0 and -0.0 are equal). A NaN ranks with -inf.

    Args:
        scores: floating tensor of any shape, n elements.
        density: share of ones, in [0, 1].
        backend: `auto` or the name of a back end.

    Returns:
        uint8 (ceil(n / 64) * 8,), packed, on the device of `scores`.

    Raises:
        TypeError: `scores` is not floating, `density` is no number.
        ValueError: `density` lies outside [0, 1].
        BackendUnavailable: the back end named cannot run.

    Gradients: none (see learned_linear). Deterministic: yes.
    Source: Ramanujan et al., CVPR 2020 (edge-popup); the order of equal scores is this library's.
    """
    _checks.floating("scores", scores)
    density = _checks.share("density", density)
    return torch.ops.fastmask.topk_mask(scores.detach(), density, backend)


def _implementation(scores: Tensor, density: float, backend: str) -> Tensor:
    return _backend.resolve("topk_mask", backend, scores.device, scores.dtype).topk_mask(
        scores, density
    )


def _fake(scores: Tensor, density: float, backend: str) -> Tensor:
    return scores.new_empty(packed_bytes(scores.numel()), dtype=torch.uint8)


register("topk_mask(Tensor scores, float density, str backend) -> Tensor", _implementation, _fake)
