"""masked_weights: by hand, each like the weight it is of, gradients, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    mask,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

LAST = torch.channels_last
SHAPES = [*ADVERSARIAL_SHAPES, (5, 3, 3, 2), (17, 16, 3, 3), (0, 3), (7,), ()]


def made(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of all shapes with NaN under their masks, and the masks."""
    masks = [mask(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    weights = [values(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    return [torch.where(m, w, float("nan")) for m, w in zip(masks, weights, strict=True)], masks


def test_by_hand() -> None:
    weights = [torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([[4.0], [float("inf")]])]
    bits = [ops.pack(torch.tensor([True, False, False])), ops.pack(torch.tensor([[True], [False]]))]
    chosen = ops.masked_weights(weights, bits)
    assert [one.tolist() for one in chosen] == [[1.0, 0.0, 0.0], [[4.0], [0.0]]]
    assert ops.masked_weights([], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_and_memory_formats(dtype: torch.dtype) -> None:
    weights, masks = made(dtype)
    bits = [ops.pack(m) for m in masks]
    want = [torch.where(m, w, 0.0).to(dtype) for w, m in zip(weights, masks, strict=True)]
    last = [w.to(memory_format=LAST) if w.dim() == 4 else w for w in weights]
    strange = [non_contiguous(w) for w in weights]
    for given in (weights, last, strange):
        with poisoned_memory():
            got = ops.masked_weights(given, bits)
        for one, other, like in zip(got, want, given, strict=True):
            assert_same_bits(one, other)
            assert one.stride() == torch.empty_like(like).stride()


def test_gradients() -> None:
    masks = [mask(4, 3), mask(5), mask(2, 3, 3, 3)]
    leaves = [values(*m.shape, seed=i).requires_grad_(i != 1) for i, m in enumerate(masks)]
    chosen = ops.masked_weights(leaves, [ops.pack(m) for m in masks])
    # The last is not used.
    (3 * chosen[0]).sum().backward()
    assert leaves[0].grad is not None and leaves[2].grad is not None
    assert torch.equal(leaves[0].grad, 3.0 * masks[0])
    assert leaves[1].grad is None and not leaves[2].grad.any()


def test_autocast_rounds_as_a_convolution_does() -> None:
    w, m = values(5, 7).requires_grad_(), mask(5, 7)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        (chosen,) = ops.masked_weights([w], [ops.pack(m)])
    assert_same_bits(chosen.detach(), torch.where(m, w.detach().bfloat16(), 0.0).bfloat16())
    chosen.float().sum().backward()
    assert w.grad is not None and torch.equal(w.grad, m.float())


def test_opcheck_and_compiled_code() -> None:
    weights, bits = [values(5, 7), values(3)], [ops.pack(mask(5, 7)), ops.pack(mask(3))]
    opcheck(torch.ops.fastmask.masked_weights, (weights, bits, torch.float32, "auto"))
    compiled = torch.compile(
        lambda w, b: ops.masked_weights(w, b), fullgraph=True, backend="aot_eager"
    )
    for one, other in zip(compiled(weights, bits), ops.masked_weights(weights, bits), strict=True):
        assert_same_bits(one, other)


def test_what_it_refuses() -> None:
    w, bits = values(5, 7), ops.pack(mask(5, 7))
    for weights, active, error, said in (
        (w, [bits], TypeError, "weights: expected a list of tensors, got Tensor"),
        ([w], bits, TypeError, "active: expected a list of tensors, got Tensor"),
        ([w, w], [bits], ValueError, "active: expected 2 elements, one for each of weights, got 1"),
        ([w, w.double()], [bits, bits], TypeError, r"weights\[1\]: expected dtype torch.float32"),
        ([w.long()], [bits], TypeError, r"weights\[0\]: expected dtype float32"),
        ([w], [bits[:-1]], ValueError, r"active\[0\]: expected shape"),
        (
            [w],
            [bits.unsqueeze(0)],
            ValueError,
            r"active\[0\]: expected shape .*one mask, not several",
        ),
    ):
        with pytest.raises(error, match=said):
            ops.masked_weights(weights, active)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match="masked_weights: back end 'cuda' cannot be used"):
        ops.masked_weights([w], [bits], backend="cuda")
