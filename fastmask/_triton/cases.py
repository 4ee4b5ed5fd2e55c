"""The calls whose kernels are compiled ahead of time: each op in each dtype and path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of the gradients of x, weight, scores and bias that of the scores alone.
_SCORES = [False, False, True, False]


@dataclass(frozen=True)
class Case:
    """An op, what tells the case apart, and a launcher with its arguments on the CPU."""

    op: str
    what: str
    launcher: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.what}"


def cases() -> list[Case]:
    """Every case, op by op."""
    return [*_bits(), *_steps(), *_conv(), *_linear(), *_learned(), *_weight(), *_weights()]


def _bits() -> Iterator[Case]:
    n = 4096
    yield Case("pack", "bool", "pack", (torch.zeros(n, dtype=torch.bool), 0.0))
    yield Case("unpack", "bool", "unpack", (_bytes(n), n))
    yield Case("popcount", "words", "popcount", (_bytes(n),))
    for dtype in FLOATS:
        scores = torch.zeros(n, dtype=dtype)
        yield Case("pack", _name(dtype), "pack", (scores, 0.5))
        for samples in (1, 8):
            sampled = (scores, torch.tensor(3), samples, 5)
            yield Case("sample_mask", f"{_name(dtype)}-S{samples}", "sample_mask", sampled)
        yield Case("topk_mask", _name(dtype), "topk_mask", (scores, 0.5))
    yield Case("topk_mask", "float32-large", "topk_mask", (torch.zeros(2**23), 0.5))


def _steps() -> Iterator[Case]:
    n = 4096
    for dtype in FLOATS:
        t = [torch.zeros(n, dtype=dtype)]
        bits, count = [_bytes(n)], [torch.zeros(1)]
        yield Case("restore_frozen_", _name(dtype), "restore_frozen_", (t, t, bits))
        numbers = (0.9, 0.1, 0.0, True, False, False)
        lr = torch.tensor(0.1)
        yield Case("masked_sgd_", _name(dtype), "masked_sgd_", (t, t, t, bits, lr, *numbers))
        betas = (0.9, 0.999, 1e-8, 0.1, False)
        for what, largest in (("", []), ("-amsgrad", t)):
            lists = (t, t, t, t, largest, count, bits, lr)
            yield Case("masked_adamw_", _name(dtype) + what, "masked_adamw_", (*lists, *betas))


def _conv() -> Iterator[Case]:
    many = [torch.zeros(n, 16, 3, 3) for n in (16, 32, 64)]
    last = [w.to(memory_format=torch.channels_last) for w in many]
    packed = [_bytes(w.numel()) for w in many]
    for dtype in FLOATS:
        some = ([w.to(dtype) for w in (*many, *last)], packed * 2)
        for rounded in FLOATS if dtype == torch.float32 else (dtype, torch.float32):
            what = f"{_name(dtype)}-to-{_name(rounded)}"
            yield Case("masked_weights", what, "masked_weights", (*some, rounded))
    size, geometry = (64, 64, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    bits = _bytes(64 * 64 * 9).expand(2, -1)
    for dtype in FLOATS:
        x, w = torch.zeros(2, 64, 8, 8, dtype=dtype), torch.zeros(size, dtype=dtype)
        for what, kept in (("", w), ("-last", w.to(memory_format=torch.channels_last))):
            drawn = (x, kept, bits, None, *geometry)
            yield Case("masked_conv2d", _name(dtype) + what, "masked_conv2d", drawn)
        taught = (x, x, bits, list(size), *geometry)
        yield Case("masked_conv2d", f"{_name(dtype)}-dw", "grad_weight", taught)
        scores = torch.zeros(size)
        for method, seed in (("gumbel", torch.tensor(3)), ("threshold", None)):
            how = (method, 1 + (seed is not None), 0.5, None, "zero", False)
            learned = (x, w, scores, None, seed, *geometry, *how)
            yield Case("learned_conv2d", f"{_name(dtype)}-{method}", "learned_conv2d", learned)


def _linear() -> Iterator[Case]:
    N, K = 4096, 4096
    bits = _bytes(N * K).unsqueeze(0)
    odd = _bytes(256 * 256).unsqueeze(0)[:, : 255 * 32]
    for dtype in FLOATS:
        w, b = torch.zeros(N, K, dtype=dtype), torch.zeros(N, dtype=dtype)
        # From some 100 rows float32 goes through scratch.
        most = 64 if dtype == torch.float32 else 256
        for B in (1, 4, 16, 32, 64) if most == 64 else (1, 4, 16, 32, 64, 128, most):
            x, what = torch.zeros(B, K, dtype=dtype), f"{_name(dtype)}-B{B}"
            yield Case("masked_linear", what, "masked_linear", (x, w, bits, b, None))
            if B > 4:
                yield Case("masked_linear", f"{what}-dx", "grad_input", (x, w, bits, None))
        yield Case("masked_linear", f"{what}-dw", "grad_weight", (x, x, bits, None))
        small = torch.zeros(1024, 2048, dtype=dtype)
        many = (small, torch.zeros(2048, 2048, dtype=dtype), bits[:, : 2048 * 256])
        what = f"{_name(dtype)}-many"
        yield Case("masked_linear", what, "masked_linear", (*many, b[:2048], None))
        yield Case("masked_linear", f"{what}-dw", "grad_weight", (small, small, many[2], None))
        groups = torch.arange(64) % 4
        four = bits.expand(4, -1)
        x = torch.zeros(64, K, dtype=dtype)
        yield Case("masked_linear", f"{_name(dtype)}-S4-dw", "grad_weight", (x, x, four, None))
        what = f"{_name(dtype)}-groups"
        yield Case("masked_linear", what, "masked_linear", (x, w, four, b, groups))
        yield Case("masked_linear", f"{what}-dx", "grad_input", (x, w, four, groups))
        yield Case("masked_linear", f"{what}-dw", "grad_weight", (x, x, four, groups))
        # Rows of 255 do not start on a byte.
        x, w, b = (torch.zeros(n, dtype=dtype) for n in ((64, 255), (256, 255), (256,)))
        what, grad = f"{_name(dtype)}-odd", torch.zeros(64, 256, dtype=dtype)
        yield Case("masked_linear", what, "masked_linear", (x, w, odd, b, None))
        yield Case("masked_linear", f"{what}-B1", "masked_linear", (x[:1], w, odd, b, None))
        yield Case("masked_linear", f"{what}-dx", "grad_input", (grad, w, odd, None))
        yield Case("masked_linear", f"{what}-dw", "grad_weight", (grad, x, odd, None))


def _learned() -> Iterator[Case]:
    N, K, seed = 4096, 4096, torch.tensor(3)
    scores, bits = torch.zeros(N, K), _bytes(N * K).unsqueeze(0)
    for dtype in FLOATS:
        w, b = torch.zeros(N, K, dtype=dtype), torch.zeros(N, dtype=dtype)
        x, rows = torch.zeros(64, K, dtype=dtype), torch.zeros(1024, K, dtype=dtype)
        drawn = (x, w, scores, b, None, seed, "gumbel", 1, 0.0, None, "zero", False)
        taught = (rows, rows, w, scores, bits, None, seed, "gumbel", 1.0, "zero", False, _SCORES)
        yield _forward(dtype, "gumbel-B64", drawn)
        yield _backward(dtype, "gumbel-ds", taught)
        lr = torch.tensor(0.1)
        sgd = (lr, 0.9, 0.1, 0.0, True, False, False)
        stepped = (
            rows,
            rows,
            w,
            scores,
            bits,
            scores,
            None,
            seed,
            "gumbel",
            1.0,
            "zero",
            False,
            *sgd,
        )
        yield _stepped(dtype, "gumbel", stepped)
        plain = (lr, 0.0, 0.0, 0.0, False, False, False)
        of_bits = (rows, rows, w, scores, bits, None, None, None, "threshold", 1.0, "zero", True)
        yield _stepped(dtype, "threshold-scale", (*of_bits, *plain))
        yield _forward(dtype, "gumbel-B1", (x[:1], *drawn[1:]))
        flipped = (x, w, scores, b, None, None, "threshold", 1, 0.5, None, "flip", False)
        yield _forward(dtype, "threshold-flip-B64", flipped)
        for kind in FLOATS[1:]:
            of_kind = (x, w, scores.to(kind), *flipped[3:])
            yield _forward(dtype, f"threshold-of-{_name(kind)}-B64", of_kind)
        scaled = (rows, rows, w, scores, bits, None, None, "threshold", 1.0, "zero", True, _SCORES)
        yield _backward(dtype, "threshold-scale-ds", scaled)
        four, groups = bits.expand(4, -1), torch.arange(64) % 4
        named = (x, x, w, scores, four, groups, seed, "gumbel", 1.0, "zero", False, _SCORES)
        yield _backward(dtype, "gumbel-groups-ds", named)
        yield _stepped(dtype, "gumbel-groups", (*named[:5], scores, *named[5:-1], *sgd))
        # Rows of 255 do not start with a Philox call.
        x, w, grad = (torch.zeros(n, dtype=dtype) for n in ((64, 255), (256, 255), (64, 256)))
        odd = (torch.zeros(256, 255), bits[:, : 255 * 32])
        odd_ones = (grad, x, w, *odd, None, seed, "gumbel", 0.5, "flip", False, _SCORES)
        yield _backward(dtype, "gumbel-flip-odd-ds", odd_ones)
        held = torch.zeros(256, 255)
        yield _stepped(dtype, "gumbel-flip-odd", (*odd_ones[:5], held, *odd_ones[5:-1], *sgd))


def _weight() -> Iterator[Case]:
    seed, bits = torch.tensor(3), _bytes(4096).expand(2, -1)
    for dtype in FLOATS:
        w, scores, g = torch.zeros(4096, dtype=dtype), torch.zeros(4096), torch.zeros(2, 4096)
        drawn = (w, scores, seed, "gumbel", 2, 0.0, None, "zero", True)
        yield Case("learned_weight", _name(dtype), "learned_weight", drawn)
        taught = (g.to(dtype), w, scores, bits, seed, "gumbel", 0.5, "zero", True, [True, True])
        yield Case("learned_weight", f"{_name(dtype)}-dw-ds", "learned_weight_grad", taught)


def _weights() -> Iterator[Case]:
    many = [torch.zeros(n, 16, 3, 3) for n in (16, 32, 64)]
    last = [w.to(memory_format=torch.channels_last) for w in many]
    seeds, packed = torch.arange(3), [_bytes(w.numel()) for w in many]
    for scores, what in ((many, ""), (last, "-last")):
        for dtype in FLOATS[:2]:
            w = [one.to(dtype) for one in scores]
            drawn = (w, scores, seeds, "gumbel", 0.0, None, "zero", dtype)
            yield Case("learned_weights", f"{_name(dtype)}{what}", "learned_weights", drawn)
            taught = (w, w, scores, packed, seeds, "gumbel", 0.5, "zero", [True, True])
            yield _gradients(f"{_name(dtype)}{what}-dw-ds", taught)
    halves = [w.half() for w in many]
    rounded = (many, many, seeds, "gumbel", 0.0, None, "flip", torch.bfloat16)
    yield Case("learned_weights", "float32-to-bfloat16-flip", "learned_weights", rounded)
    above = (halves, many, None, "threshold", 0.5, None, "zero", torch.float16)
    yield Case("learned_weights", "float16-threshold", "learned_weights", above)
    of_scores = (halves, many, many, packed, seeds, "gumbel", 1.0, "flip", [False, True])
    yield _gradients("float16-to-float32-ds", of_scores)


def _gradients(what: str, arguments: tuple[Any, ...]) -> Case:
    return Case("learned_weights", what, "learned_weights_grad", arguments)


def _forward(dtype: torch.dtype, what: str, arguments: tuple[Any, ...]) -> Case:
    return Case("learned_linear", f"{_name(dtype)}-{what}", "learned_linear", arguments)


def _backward(dtype: torch.dtype, what: str, arguments: tuple[Any, ...]) -> Case:
    return Case("learned_linear", f"{_name(dtype)}-{what}", "learned_linear_grad", arguments)


def _stepped(dtype: torch.dtype, what: str, arguments: tuple[Any, ...]) -> Case:
    return Case("learned_linear_step_", f"{_name(dtype)}-{what}", "learned_linear_step_", arguments)


def _bytes(numel: int) -> Tensor:
    return torch.zeros(numel // 8, dtype=torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
