"""Argument checks that several ops make, each naming the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.ops._layout import packed_bytes

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a plain, strided tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def floating(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a real floating-point tensor."""
    tensor(name, value)
    if value.dtype not in FLOATING:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name}: expected dtype {wanted}, got {value.dtype}")


def same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless two tensors share their device and, where asked, their dtype."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected a tensor on {other.device} like {other_name}, got one on {value.device}"
        )
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected dtype {other.dtype} like {other_name}, got {value.dtype}"
        )


def shape(name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    """Raise ValueError unless `value` has exactly the expected shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({why}), got {tuple(value.shape)}"
        )


def packed(name: str, bits: Tensor, numel: int, like_name: str, like: Tensor) -> None:
    """Raise unless `bits` are packed masks, (bytes,) or (S, bytes), of `numel` elements."""
    tensor(name, bits)
    if bits.dtype != torch.uint8:
        raise TypeError(
            f"{name}: expected packed bits (uint8, see fastmask.ops.pack), got {bits.dtype}"
        )
    if bits.dim() not in (1, 2) or bits.shape[-1] != packed_bytes(numel):
        raise ValueError(
            f"{name}: expected shape ({packed_bytes(numel)},) or (S, {packed_bytes(numel)}), the "
            f"packed bits of {like_name} {tuple(like.shape)}, got {tuple(bits.shape)}"
        )
    same(name, bits, like_name, like, dtype=False)


def rows(x: Tensor, samples: int, groups: Tensor | None, mask_name: str) -> None:
    """Raise unless the rows of x can be dealt to `samples` masks, in equal groups or by `groups`."""
    count = math.prod(x.shape[:-1])
    if groups is None:
        if samples < 1 or count % samples:
            raise ValueError(
                f"{mask_name}: expected a number of masks that divides the {count} rows of x "
                f"(or groups naming the mask of each row), got {samples} masks"
            )
        return
    tensor("groups", groups)
    if groups.dtype != torch.int64:
        raise TypeError(f"groups: expected dtype torch.int64, got {groups.dtype}")
    shape("groups", groups, x.shape[:-1], "one mask index for each row of x")
    same("groups", groups, "x", x, dtype=False)


def images(x: Tensor, samples: int, mask_name: str) -> None:
    """Raise unless the images of x (B, C, H, W) can be dealt to `samples` masks in equal groups."""
    if samples < 1 or x.shape[0] % samples:
        raise ValueError(
            f"{mask_name}: expected a number of masks that divides the {x.shape[0]} images of x, got "
            f"{samples} masks"
        )


def pair(name: str, value: int | Sequence[int], low: int) -> list[int]:
    """Return two whole numbers of at least `low`, given as one or as a pair, or raise."""
    given = value if isinstance(value, list | tuple) else (value, value)
    both = [v for v in given if isinstance(v, int) and not isinstance(v, bool)]
    if len(given) != 2 or len(both) != 2:
        raise TypeError(f"{name}: expected a whole number or a pair of them, got {value!r}")
    if min(both) < low:
        raise ValueError(f"{name}: expected at least {low}, got {value!r}")
    return both


def in_range(groups: Tensor | None, samples: int) -> None:
    """Raise ValueError where a row names a mask that is not there (CPU only: a GPU would be stalled)."""
    if groups is None or groups.device.type != "cpu" or groups.numel() == 0:
        return
    low, high = torch.aminmax(groups)
    if low < 0 or high >= samples:
        raise ValueError(
            f"groups: expected mask indices in [0, {samples}), got {int(low)} to {int(high)}"
        )


def finite(name: str, value: float, *, positive: bool = False) -> float:
    """Return `value` as a float; raise ValueError where it is NaN, infinite or, if asked, not > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Not math.isfinite: a compiled step turns a number that changes into a symbol, which has no such test.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        kind = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{name}: expected {kind}, got {value}")
    return float(value)


def share(name: str, value: float) -> float:
    """Return `value` as a float in [0, 1], or raise."""
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a share in [0, 1], got {value}")
    return number


def count(name: str, value: int) -> int:
    """Return a whole number of at least 1, or raise."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of a few."""
    if value not in allowed:
        wanted = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}: expected one of {wanted}, got {value!r}")


def autocast(value: Tensor) -> Tensor:
    """Cast as `F.linear` does where autocast is on for the tensor's device; float64 is left alone."""
    kind = value.device.type
    if kind == "meta" or value.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return value
    return value.to(torch.get_autocast_dtype(kind))
