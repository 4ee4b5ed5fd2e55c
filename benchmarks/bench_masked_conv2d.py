"""masked_conv2d: layers of residual networks, one image and many.

python benchmarks/bench_masked_conv2d.py [--shapes resnet18|resnet50|vit|all] [--device cpu] [--csv FILE]

Images are channels-last on a GPU, as one trains there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import ops
from fastmask._benchmarks import harness, rivals, shapes, timing
from fastmask.testing import assert_within_budget


def tensors(
    layer: shapes.Conv, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Images, the weight and the options of a layer."""
    out, into, kernel, size, stride, images = layer
    torch.manual_seed(0)
    format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    x = torch.randn(images, into, size, size, device=device).to(dtype, memory_format=format)
    w = torch.randn(out, into, kernel, kernel, device=device).to(dtype)
    return x, w, {"stride": stride, "padding": 0 if kernel == stride else kernel // 2}


def name(layer: shapes.Conv) -> str:
    """A layer as a row of the table says it."""
    out, into, kernel, size, stride, images = layer
    return f"N{out} C{into} {kernel}x{kernel}/{stride} HW{size} B{images}"


def cost(layer: shapes.Conv, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of images, weight, bits and output, once each; operations of the direct product."""
    out, into, kernel, size, stride, images = layer
    side = (size - 1) // stride + 1 if kernel != stride else size // stride
    weights, positions = out * into * kernel**2, images * side**2
    elements = images * into * size**2 + weights + positions * out
    return elements * dtype.itemsize + weights // 8, 2 * weights * positions


def case(setup: harness.Setup, layer: shapes.Conv, dtype: torch.dtype) -> harness.Case:
    """One layer, half of its weights active."""
    device = setup.device

    def prepare() -> harness.Contest:
        x, w, options = tensors(layer, device, dtype)
        keep = torch.rand(w.shape, device=device) < 0.5
        bits, factor, scratch = ops.pack(keep), keep.to(dtype), torch.empty_like(w)
        copies = timing.rotate(x)

        def verify(backend: str) -> None:
            some = rivals.some_rows(len(x), device, 2)
            selected = torch.where(keep, w, 0)
            got = ops.masked_conv2d(x, w, bits, **options, backend=backend)[some]
            exact = F.conv2d(x[some].double(), selected.double(), **options)
            assert_within_budget(got, F.conv2d(x[some], selected, **options), exact)

        def ours(backend: str, i: int) -> Tensor:
            return ops.masked_conv2d(
                copies[i % len(copies)][0], w, bits, **options, backend=backend
            )

        def make() -> nn.Module:
            return nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False, **options)

        found = {
            "eager float": lambda x: F.conv2d(x, w * factor, **options),
            "eager bool": lambda x: F.conv2d(x, w * keep, **options),
            "best eager": lambda x: F.conv2d(x, torch.mul(w, factor, out=scratch), **options),
            "prune": rivals.pruned(make, w, keep),
            "dense": lambda x: F.conv2d(x, w, **options),
        }
        if setup.compiled:
            found["compile"] = rivals.compiled(found["eager float"], device)  # type: ignore[assignment]
        return harness.Contest(
            verify, ours, {name: rivals.in_turn(f, copies) for name, f in found.items()}
        )

    moved, flops = cost(layer, dtype)
    return harness.Case("masked_conv2d", dtype, name(layer), 0.5, moved, prepare, flops)


def cases(setup: harness.Setup) -> Iterator[harness.Case]:
    """Every case, in the order of the sets named."""
    for dtype in rivals.dtypes(setup, (torch.float32,), (torch.bfloat16, torch.float32)):
        for layer in shapes.conv(setup.shapes, setup.device.type):
            yield case(setup, layer, dtype)


if __name__ == "__main__":
    harness.main("masked_conv2d", __doc__)
