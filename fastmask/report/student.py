"""Quantiles of Student's t for whole degrees of freedom, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Compute the t with `P(|T| <= t) = level`, T of Student's distribution.

    For whole degrees of freedom the probability is a finite sum in `theta = atan(t / sqrt(degrees))`, which
    grows with theta and is inverted by halving an interval down to neighbouring numbers.

    Args:
        degrees: of freedom, at least 1.
        level: in (0, 1).

    Raises:
        ValueError: an argument is out of range.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees: expected at least 1, got {degrees}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """`P(|T| <= sqrt(degrees) * tan(theta))`."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(degrees // 2):
        if j:
            term *= cosine * cosine * (2 * j - 1 + odd) / (2 * j + odd)
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
