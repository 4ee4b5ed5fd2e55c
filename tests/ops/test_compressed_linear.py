"""compressed_linear: by hand, against masked_linear and float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import assert_as_promised, unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def packed(n: int, k: int, density: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, the kept values and the masked weight."""
    w, m = values(n, k, seed=1), mask(n, k, density=density, seed=seed)
    active = ops.pack(m)
    return active, ops.compress(w, active), torch.where(m, w, 0)


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    active = ops.pack(torch.tensor([[True, False, True], [False, True, False]]))
    kept = ops.compress(weight, active)
    assert kept.tolist() == [1.0, 100.0, 20.0]
    assert ops.decompress(kept, active, (2, 3)).tolist() == [[1.0, 0.0, 100.0], [0.0, 20.0, 0.0]]
    x, bias = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0.5, -0.5])
    assert ops.compressed_linear(x, kept, active, 2, bias).tolist() == [[301.5, 39.5]]
    assert ops.compressed_linear(x[0], kept, active, 2).tolist() == [301.0, 40.0]


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 5))
def test_compress_and_decompress(n: int, k: int, density: float, seed: int) -> None:
    active, kept, masked = packed(n, k, density, seed)
    assert kept.shape == (int(ops.popcount(active)),)
    back = ops.decompress(kept, active, (n, k))
    assert_same_bits(back, masked)
    assert_same_bits(ops.compress(back, active), kept)


def test_kept_values_keep_their_bits_and_dropped_ones_are_gone() -> None:
    weight = torch.tensor([[float("nan"), -0.0, float("inf")], [float("nan"), 1e-45, 2.0]])
    m = torch.tensor([[True, True, False], [False, True, True]])
    active = ops.pack(m)
    kept = ops.compress(weight, active)
    assert_same_bits(kept, weight[m])
    assert_same_bits(ops.decompress(kept, active, (2, 3)), torch.where(m, weight, 0.0))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_within_budget(density: float, dtype: torch.dtype) -> None:
    for n, k in ADVERSARIAL_SHAPES:
        x, bias, dy = (
            values(6, k, dtype=dtype),
            values(n, dtype=dtype),
            values(6, n, seed=2, dtype=dtype),
        )
        m = mask(n, k, density=density)
        w = values(n, k, seed=1, dtype=dtype)
        active, results = ops.pack(m), []
        for kind in (dtype, torch.float64):
            leaf = x.to(kind).requires_grad_()
            y = F.linear(leaf, torch.where(m, w.to(kind), 0), bias.to(kind))
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy.to(kind))))
        leaf = x.clone().requires_grad_()
        with poisoned_memory():
            y = ops.compressed_linear(leaf, ops.compress(w, active), active, n, bias)
            (dx,) = torch.autograd.grad(y, leaf, dy)
        for got, reference, exact in zip((y.detach(), dx), *results, strict=True):
            assert_within_budget(got, reference, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_whole_and_broken_words(dtype: torch.dtype) -> None:
    for n, k in [(61, 128), (58, 131), (63, 200)]:
        m = mask(n, k, density=0.3)
        m[0], m[-3:] = True, False  # the last value belongs to no last row
        w, bias = values(n, k, seed=1, dtype=dtype), values(n, dtype=dtype)
        active, kept = ops.pack(m), ops.compress(w, ops.pack(m))
        for b in range(1, 14):
            x = values(b, k, dtype=dtype)
            masked = torch.where(m, w, 0)
            exact = F.linear(x.double(), masked.double(), bias.double())
            with poisoned_memory():
                got = ops.compressed_linear(x, kept, active, n, bias)
            assert_within_budget(got, F.linear(x, masked, bias), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_multiplied_as_they_are_kept(dtype: torch.dtype) -> None:
    w, m = values(8, 130, seed=1, dtype=dtype), mask(8, 130)
    m[1, 70], m[2, 129] = True, True
    w[1, 70], w[2, 129] = float("nan"), float("inf")
    active, x = ops.pack(m), values(2, 130, dtype=dtype)
    want = F.linear(x.double(), torch.where(m, w, 0).double())
    got = ops.compressed_linear(x, ops.compress(w, active), active, 8)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])  # `cuda` multiplies by kept values alone
def test_infinity_times_what_is_not_kept_is_nan(backend: str, dtype: torch.dtype) -> None:
    w, m, x = values(8, 130, seed=1, dtype=dtype), mask(8, 130), values(2, 130, dtype=dtype)
    x[1, 5] = float("inf")
    active = ops.pack(m)
    got = ops.compressed_linear(x, ops.compress(w, active), active, 8, backend=backend)
    assert torch.equal(got[1].isnan(), ~m[:, 5])
    assert got[0].isfinite().all()


def test_it_is_masked_linear_stored_small() -> None:
    w, x = values(37, 45, seed=1), values(6, 45)
    active = ops.pack(mask(37, 45, density=0.2))
    kept = ops.compress(w, active)
    got = ops.compressed_linear(x, kept, active, 37)
    want = ops.masked_linear(x, w, active, backend="reference")
    assert_within_budget(got, want, ops.masked_linear(x.double(), w.double(), active))
    assert kept.nbytes + active.nbytes < 0.25 * w.nbytes


def test_shapes_strides_and_empty_batches() -> None:
    active, kept, masked = packed(37, 45)
    x = values(2, 3, 45)
    y = ops.compressed_linear(x, kept, active, 37)
    assert y.shape == (2, 3, 37)
    torch.testing.assert_close(y, F.linear(x, masked))
    strange = ops.compressed_linear(non_contiguous(x), non_contiguous(kept), active, 37)
    assert_same_bits(strange, y)
    assert ops.compressed_linear(x[:0], kept, active, 37).shape == (0, 3, 37)
    empty = torch.zeros(0, 45, requires_grad=True)
    ops.compressed_linear(empty, kept, active, 37).sum().backward()
    assert empty.grad is not None
    nothing = ops.compressed_linear(values(2, 0), kept[:0], active[:0], 4, values(4))
    assert_same_bits(nothing, values(4).expand(2, -1).contiguous())
    transposed = values(45, 37).T
    assert_same_bits(
        ops.compress(transposed, active), ops.compress(transposed.contiguous(), active)
    )


def test_gradcheck_of_x_alone() -> None:
    active, kept, _ = packed(3, 5)
    x = values(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.compressed_linear(x, kept.double(), active, 3), x)


def test_autocast_as_linear_does() -> None:
    active, kept, masked = packed(37, 45)
    x, bias = values(6, 45), values(37)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y, plain = ops.compressed_linear(x, kept, active, 37, bias), F.linear(x, masked, bias)
        exact = ops.compressed_linear(x.double(), kept.double(), active, 37, bias.double())
    assert exact.dtype == torch.float64
    assert_as_promised(y, plain, exact)


def test_opcheck_and_compiled_code() -> None:
    active, kept, _ = packed(37, 45)
    x, bias = values(6, 45), values(37)
    opcheck(torch.ops.fastmask.compressed_linear, (x, kept, active, 37, bias, "auto"))
    opcheck(
        torch.ops.fastmask.compressed_linear_grad_input, (values(6, 37), kept, active, 45, "auto")
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.compressed_linear, fullgraph=True, backend=counter)
    leaf = x.requires_grad_()
    results = []
    for function in (ops.compressed_linear, compiled):
        y = function(leaf, kept, active, 37, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for eager, other in zip(*results, strict=True):
        assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_what_it_refuses() -> None:
    active, kept, _ = packed(37, 45)
    x, bias = values(6, 45), values(37)

    def refuse(kind: type[Exception], match: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=match):
            ops.compressed_linear(*args, **options)  # type: ignore[arg-type]

    refuse(ValueError, r"active: expected shape \(216,\) \(the packed bits of a weight \(37, 45\)\)",
           x, kept, active[:-8], 37)  # fmt: skip
    refuse(ValueError, r"active: expected shape \(216,\)", x, kept, active.unsqueeze(0), 37)
    refuse(TypeError, "active: expected packed bits", x, kept, mask(37, 45), 37)
    refuse(ValueError, r"active: expected a tensor on (cpu|cuda:0)", x, kept, active.to("meta"), 37)
    refuse(
        ValueError,
        f"values: expected {len(kept)} values, one for each 1 of active",
        x,
        kept[:-1],
        active,
        37,
    )
    refuse(ValueError, r"values: expected shape \(number of ones,\)", x, kept[None], active, 37)
    refuse(TypeError, "values: expected dtype torch.float32 like x", x, kept.double(), active, 37)
    refuse(ValueError, "values: expected a tensor without requires_grad", x,
           kept.clone().requires_grad_(), active, 37)  # fmt: skip
    refuse(ValueError, "bias: expected a tensor without requires_grad", x, kept, active, 37,
           bias.clone().requires_grad_())  # fmt: skip
    refuse(ValueError, r"bias: expected shape \(37,\)", x, kept, active, 37, bias[:-1])
    refuse(TypeError, "bias: expected dtype torch.float32", x, kept, active, 37, bias.double())
    refuse(ValueError, "out_features: expected at least 1, got 0", x, kept, active, 0)
    refuse(TypeError, "out_features: expected a whole number", x, kept, active, 37.0)
    refuse(TypeError, "x: expected dtype", x.long(), kept, active, 37)
    refuse(ValueError, r"x: expected shape \(\.\.\., K\)", torch.tensor(1.0), kept, active, 37)
    refuse(
        BackendUnavailable,
        f"back end '{unusable()}' cannot be used",
        x,
        kept,
        active,
        37,
        backend=unusable(),
    )
    with torch.no_grad():
        trained = kept.clone().requires_grad_()
        assert ops.compressed_linear(x, trained, active, 37).shape == (6, 37)
    with pytest.raises(ValueError, match=r"active: expected shape \(232,\)"):
        ops.compress(values(40, 45), active)
    with pytest.raises(ValueError, match=f"values: expected {len(kept)} values"):
        ops.decompress(kept[1:], active, (37, 45))
