"""Device functions of the random bits: Philox4x32-10 words and the threshold of a logit.

    key = seed      counter = (e // 4 low, e // 4 high, sample, stream)      element e takes word e % 4
    k = word >> 8   the bit is 1 where k < T(l) = floor(sigmoid(l) * 2^24)

Kernels that call `threshold` are compiled with `enable_fp_fusion=False`: each operation is rounded by itself,
as in `ops/sample_mask/reference.py`, so that T is the same integer everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Twice how near to its threshold an integer is compared with the threshold itself: at most 1 in 65,536 is.
NEAR = 128


@triton.jit
def uniform24(seed, quad, sample, stream, WIDE: tl.constexpr):
    """The integers k (Q, 4) of the elements 4 quad .. 4 quad + 3: all four words of one Philox call."""
    low = quad.to(tl.uint32)
    if WIDE:
        high = (quad >> 32).to(tl.uint32)
    else:
        high = low * 0
    third, fourth = low * 0 + sample, low * 0 + stream
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, fourth)
    # join appends an axis of two: [m, k] is word 2 m + k.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return (tl.reshape(words, (quad.shape[0], 4)) >> 8).to(tl.int32)


@triton.jit
def sigmoid(logit):
    """The contract's float32 sigmoid, one rounded operation after the other; NaN gives 0."""
    logit = tl.where(logit == logit, logit, -40.0)
    a = tl.minimum(tl.abs(logit), 40.0)
    n = tl.floor(a * 1.44269502162933349609375 + 0.5)
    r = (a - n * 0.693359375) - n * -2.12194442e-4
    z = -0.00831876509 * r + 0.0419019051
    z = z * r + -0.166671857
    z = z * r + 0.499990255
    z = z * r + -0.999999821
    z = z * r + 1.0
    # 2^-n, exactly, by its bits.
    z = z * ((127 - n.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(logit >= 0, 1.0, z), 1.0 + z)


@triton.jit
def threshold(logit):
    """T(l) = floor(sigmoid(l) * 2^24), int32; the sigmoid is positive, so that cutting off is floor."""
    return (sigmoid(logit) * 16777216.0).to(tl.int32)


@triton.jit
def drawn(logit, k, NEAR: tl.constexpr):
    """Whether k < T(l), by an estimate where it leaves no doubt: some 15 instructions for the threshold's 50.

    With e = exp(-|l|) the sign of (1 or e) 2^24 - k (1 + e) decides. Its rounding, the device's exp (2^-22)
    and that of T together stay below 32; where an element of the tile is nearer than NEAR, T decides for all.
    """
    certain = tl.where(logit == logit, logit, -40.0)
    e = tl.exp(-tl.abs(certain))
    gap = tl.where(certain >= 0, 16777216.0, e * 16777216.0) - k.to(tl.float32) * (1.0 + e)
    ones = gap > 0
    if tl.max((tl.abs(gap) < NEAR).to(tl.int32)) != 0:
        ones = k < threshold(logit)
    return ones


@triton.jit
def own24(seed, element, sample, stream, WIDE: tl.constexpr):
    """The integer k of each element by itself, where neighbours do not start a Philox call together."""
    quad = element >> 2
    low = quad.to(tl.uint32)
    if WIDE:
        high = (quad >> 32).to(tl.uint32)
    else:
        high = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + sample, low * 0 + stream)
    odd, upper = (element & 1) != 0, (element & 2) != 0
    word = tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return (word >> 8).to(tl.int32)


@triton.jit
def slope(logit, k, rate, UNIT: tl.constexpr):
    """s (1 - s) rate of s = sigmoid((logit + n) rate), n the noise of the integer k; UNIT where rate is 1.

    n = log(above / below), so that at rate 1 no logarithm is needed. s (1 - s) is the same of -n and -logit:
    exp is taken of a negative number alone, nothing overflows, and 1 - s does not cancel.
    """
    below, above = (2 * k + 1).to(tl.float32), (33554431 - 2 * k).to(tl.float32)
    if UNIT:
        u = tl.where(logit >= 0, below, above) * tl.exp(-tl.abs(logit))
        v = tl.where(logit >= 0, above, below)
        found = u * v / ((u + v) * (u + v))
    else:
        z = tl.exp(-tl.abs((logit + tl.log(above / below)) * rate))
        found = z / ((1.0 + z) * (1.0 + z)) * rate
    return found
