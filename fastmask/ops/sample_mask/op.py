"""sample_mask: Bernoulli masks of logits from a counter-based generator; draw_seed: their seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _backend
from fastmask.ops import _checks
from fastmask.ops._layout import packed_bytes
from fastmask.ops._register import register

_WORD = 2**32


def sample_mask(
    logits: Tensor,
    seed: int | Tensor | None = None,
    samples: int = 1,
    stream: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sample masks whose bits are 1 with probability sigmoid(logit): `bit = k < floor(sigmoid(l) * 2**24)`.

    k is the upper 24 bits of word `e % 4` of Philox4x32-10 with the seed as key and the counter
    `(e // 4 low, e // 4 high, sample, stream)`: the same seed gives the same bits on every back end,
    device, thread count and batch split. It is the hard sample of the Gumbel-sigmoid (s > 0.5 for
    `s = sigmoid((l + n) / tau)`) for every tau. A NaN logit gives 0.

    Args:
        logits: floating tensor of any shape, taken as float32.
        seed: whole number in [0, 2**64), a 0-d int64 tensor (read as 64 bits), or None for `draw_seed`.
        samples: number S of independent masks.
        stream: whole number in [0, 2**32) that tells draws with one seed apart (a layer's index, say).
        backend: `auto` or the name of a back end.

    Returns:
        uint8 (S, ceil(n / 64) * 8), packed.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.

    Gradients: none (bits carry none; see learned_linear). Deterministic: given the seed.
    Source: arXiv 2308.13957, 5.3; Salmon et al., SC 2011 (Philox).
    """
    _checks.floating("logits", logits)
    samples = _checks.count("samples", samples)
    stream = check_stream(stream)
    return torch.ops.fastmask.sample_mask(
        logits.detach(), seed_tensor(seed, logits), samples, stream, backend
    )


def draw_seed(like: Tensor, size: Sequence[int] = ()) -> Tensor:
    """Draw seeds from torch's generator of a tensor's device: int64, one (0-d) or `size`, all 64 bits random.

    `torch.manual_seed` rules it; compiled and eager code draw the same; CUDA graphs advance it.
    """
    return torch.ops.fastmask.draw_seed(like, size)


def seed_tensor(seed: int | Tensor | None, like: Tensor) -> Tensor:
    """Check a seed and return it as a 0-d int64 tensor on a tensor's device."""
    if seed is None:
        return draw_seed(like.detach())
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(
                f"seed: expected a 0-d int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.to(like.device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed: expected a whole number, a tensor or None, got {type(seed).__name__}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected a whole number in [0, 2**64), got {seed}")
    # Filled there: a copy from the host would wait for the device, and no CUDA graph could hold it.
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), signed, dtype=torch.int64, device=like.device)


def check_stream(stream: int) -> int:
    """Return a stream number in [0, 2**32), or raise."""
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream: expected a whole number, got {type(stream).__name__}")
    if not 0 <= stream < _WORD:
        raise ValueError(f"stream: expected a whole number in [0, 2**32), got {stream}")
    return stream


def _implementation(
    logits: Tensor, seed: Tensor, samples: int, stream: int, backend: str
) -> Tensor:
    module = _backend.resolve("sample_mask", backend, logits.device, logits.dtype)
    return module.sample_mask(logits, seed, samples, stream)


def _fake(logits: Tensor, seed: Tensor, samples: int, stream: int, backend: str) -> Tensor:
    return logits.new_empty((samples, packed_bytes(logits.numel())), dtype=torch.uint8)


def _draw(like: Tensor, size: Sequence[int] = ()) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, tuple(size), dtype=torch.int64, device=like.device)


def _draw_fake(like: Tensor, size: Sequence[int] = ()) -> Tensor:
    return like.new_empty(tuple(size), dtype=torch.int64)


register(
    "sample_mask(Tensor logits, Tensor seed, SymInt samples, int stream, str backend) -> Tensor",
    _implementation,
    _fake,
)
register(
    "draw_seed(Tensor like, SymInt[] size=[]) -> Tensor",
    _draw,
    _draw_fake,
    tags=(torch.Tag.nondeterministic_seeded,),
)
# Above vmap's own layer, so that torch's randint obeys the `randomness` of vmap, or refuses.
torch.library.impl("fastmask::draw_seed", "FuncTorchVmapMode", _draw)
