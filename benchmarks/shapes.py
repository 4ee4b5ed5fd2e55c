"""The shapes that benchmarks know by name: layers and parameter lists of networks people train and serve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

Linear = tuple[int, int, int]  # N out, K in, B rows
Conv = tuple[int, int, int, int, int, int]  # C out, C in, kernel, H and W in, stride, B images

# Rows of a batch of text or serving; those of vision are images times tokens.
FEW, MANY = (1, 8, 64, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LLAMA2, _LLAMA3 = ((11008, 4096), (4096, 11008), (32000, 4096)), (
    (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096),
)  # fmt: skip
_ODD = (1, 7, 31, 33, 127, 1000, 4095, 4097, 11007)
LINEAR: dict[str, tuple[Sequence[tuple[int, int]], Sequence[int]]] = {
    "tiny": (((37, 45), (16, 64)), (1, 6)),
    "square": (((4096, 4096),), FEW),
    "heads": (((7, 512), (10, 512), (100, 512), (1000, 512), (7, 1280), (1000, 2048)), (1, 64, 256)),
    "vit-b": (((768, 768), (2304, 768), (3072, 768), (768, 3072)), (197, 197 * 8, 197 * 64)),
    "vit-l": (((1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)), (197, 197 * 8, 197 * 64)),
    "bert": (((768, 768), (3072, 768), (768, 3072)), (128, 512, 4096)),
    "llama2-7b": (((4096, 4096), *_LLAMA2), MANY),
    "llama3-8b": (((4096, 4096), *_LLAMA3), MANY),
    "llama-70b": (((8192, 8192), (28672, 8192), (8192, 28672)), MANY),
    "adversarial": (
        (*((n, 4096) for n in _ODD), *((4096, k) for k in _ODD), *((n, n) for n in _ODD[:-1])),
        (1, 33),
    ),
}  # fmt: skip
_CPU = {
    (4096, 4096): (1, 8, 64, 256, 512),
    (4096, 11008): (1, 8, 64),
    (768, 3072): (1, 8, 64, 256),
    (3072, 768): (1, 64),
    (7, 512): (1, 64),
    (7, 1280): (1, 64, 256),
    (37, 1000): (1, 64),
}
_GPU = {
    (4096, 4096): (1, 16, 64, 256, 1024, 4096),
    (8192, 28672): (1, 16, 64, 256, 1024),
    (4096, 11008): (1, 16, 64, 256, 1024, 4096),
    (14336, 4096): (1, 64, 256, 1024),
    (4096, 14336): (1, 16),
    (768, 3072): (1, 256, 4096),
    (1000, 2048): (1, 256),
    (7, 512): (1, 64),
    (4095, 4097): (1, 64),
}

_18 = ((64, 3, 7, 224, 2), (64, 64, 3, 56, 1), (128, 64, 3, 56, 2), (128, 128, 3, 28, 1),
       (256, 128, 3, 28, 2), (256, 256, 3, 14, 1), (512, 256, 3, 14, 2), (512, 512, 3, 7, 1),
       (128, 64, 1, 56, 2), (256, 128, 1, 28, 2), (512, 256, 1, 14, 2))  # fmt: skip
_50 = ((64, 64, 1, 56, 1), (256, 64, 1, 56, 1), (64, 256, 1, 56, 1), (128, 256, 1, 56, 1),
       (512, 128, 1, 28, 1), (128, 512, 1, 28, 1), (256, 512, 1, 28, 1), (1024, 256, 1, 14, 1),
       (256, 1024, 1, 14, 1), (512, 1024, 1, 14, 1), (2048, 512, 1, 7, 1), (512, 2048, 1, 7, 1),
       (64, 64, 3, 56, 1), (128, 128, 3, 28, 1), (256, 256, 3, 14, 1), (512, 512, 3, 7, 1))  # fmt: skip
_VIT = ((768, 3, 16, 224, 16), (1024, 3, 16, 224, 16))
_FEW_CONV = (_18[1], _18[3], _18[5], _18[7], _50[8])
CONV: dict[str, tuple[Sequence[tuple[int, ...]], Sequence[int]]] = {
    "tiny": (((5, 3, 3, 9, 2), (6, 4, 1, 5, 1)), (1, 2)),
    "resnet18": (_18, (1, 8, 32, 128, 256)),
    "resnet50": (_50, (1, 8, 32, 128, 256)),
    "vit": (_VIT, (1, 8, 64)),
}


def linear(sets: Sequence[str], device: str) -> Iterator[Linear]:
    """(N, K, B) of the sets named; `default` is what the device has time for, `4096x11008` a layer by itself,
    `4096x11008x64` with its rows.

    Raises:
        ValueError: there is no such set.
    """
    for name in _named(sets, LINEAR):
        if name == "default":
            by_layer = _GPU if device == "cuda" else _CPU
            yield from ((n, k, b) for (n, k), rows in by_layer.items() for b in rows)
        elif name in LINEAR:
            layers, rows = LINEAR[name]
            yield from ((n, k, b) for n, k in layers for b in rows)
        else:
            n, k, *rest = map(int, name.split("x"))
            yield from ((n, k, b) for b in rest or FEW)


def conv(sets: Sequence[str], device: str) -> Iterator[Conv]:
    """(C out, C in, kernel, H and W in, stride, B) of the sets named.

    Raises:
        ValueError: there is no such set.
    """
    for name in _named(sets, CONV, sizes=False):
        if name == "default":
            images = (1, 32, 128) if device == "cuda" else (1, 8)
            yield from ((*layer, b) for layer in _FEW_CONV for b in images)  # type: ignore[misc]
        else:
            layers, rows = CONV[name]
            yield from ((*layer, b) for layer in layers for b in rows)  # type: ignore[misc]


def parameters(sets: Sequence[str], default: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Names and sizes of the parameters of networks.

    Raises:
        ValueError: there is no such network.
    """
    made = {
        "tiny": lambda: [45, 7, 1, 640],
        "resnet18": lambda: _resnet((2, 2, 2, 2), bottleneck=False),
        "resnet50": lambda: _resnet((3, 4, 6, 3), bottleneck=True),
        "vit-b": _vit_b,
        "flat-16m": lambda: [2**20] * 16,
        "flat-1g": lambda: [2**30],
    }
    for name in _named(sets, made, sizes=False):
        yield from ((each, made[each]()) for each in (default if name == "default" else (name,)))


def counts(sets: Sequence[str], default: Sequence[int]) -> Iterator[int]:
    """Numbers of elements: of the set named, or a number itself.

    Raises:
        ValueError: there is no such set.
    """
    known = {"tiny": (4099,), "large": (2**24, 2**26, 45_000_000)}
    for name in sets:
        if name == "default":
            yield from default
        elif name == "all":
            yield from sorted({*default, *known["large"]})
        elif name in known:
            yield from known[name]
        elif name.isdecimal():
            yield int(name)
        else:
            raise ValueError(
                f"shapes: expected default, all, {', '.join(known)} or a number of elements, got {name!r}"
            )


def _named(sets: Sequence[str], known: object, sizes: bool = True) -> Iterator[str]:
    assert isinstance(known, dict)
    for name in sets:
        if name == "all":
            yield from ("default", *(each for each in known if each != "tiny"))
        elif (
            name == "default" or name in known or (sizes and re.fullmatch(r"\d+x\d+(x\d+)?", name))
        ):
            yield name
        else:
            also = " or sizes such as 4096x11008" if sizes else ""
            raise ValueError(
                f"shapes: expected default, all, {', '.join(known)}{also}, got {name!r}"
            )


def _resnet(blocks: tuple[int, ...], bottleneck: bool) -> list[int]:
    """Sizes of a residual network's parameters, as torchvision builds it."""
    found = [64 * 3 * 49, 64, 64]
    wide, inner = 64, 64
    for stage, count in enumerate(blocks):
        out = inner * (4 if bottleneck else 1)
        for i in range(count):
            kernels = (
                ((wide, inner, 1), (inner, inner, 9), (inner, out, 1))
                if bottleneck
                else ((wide, inner, 9), (inner, out, 9))
            )
            for c, n, area in kernels:
                found += [n * c * area, n, n]
            if i == 0 and (stage > 0 or wide != out):
                found += [out * wide, out, out]
            wide = out
        inner *= 2
    return [*found, 1000 * wide, 1000]


def _vit_b() -> list[int]:
    """Sizes of ViT-B/16's parameters, as torchvision builds it."""
    d, found = 768, [768, 768 * 3 * 256, 768, 197 * 768]
    for _ in range(12):
        found += [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]
    return [*found, d, d, 1000 * d, 1000]
