"""masked_linear and compressed_linear: outputs within the budget, whatever lies under the mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmask import _backend, ops
from fastmask.errors import BackendUnavailable
from fastmask.ops.compressed_linear.op import compress, compressed_linear
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_within_budget,
    generator,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)

Put = Callable[[Tensor], Tensor]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Rows longer than a round of a block (1024), on and off bytes and words.
SHAPES = [*ADVERSARIAL_SHAPES, (5, 1024), (6, 1031), (2, 2056)]
CPU = torch.device("cpu")


def as_packed(ones: Tensor) -> Tensor:
    return torch.stack([ops.pack(each) for each in ones])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("samples", "rows", "named"),
    [(1, 1, False), (1, 3, False), (1, 9, False), (2, 4, False), (3, 11, True), (16, 3, True)],
)
def test_masked_linear(samples: int, rows: int, named: bool, dtype: torch.dtype, put: Put) -> None:
    for i, (n, k) in enumerate(SHAPES):
        ones = mask(samples, n, k, seed=i, density=(0.5, 0.0, 1.0, 0.1)[i % 4])
        weight = values(n, k, seed=i, dtype=dtype)
        spoiled = torch.where(ones.any(0), weight, torch.tensor(float("nan"), dtype=dtype))
        x, active = put(values(rows, k, seed=i + 1, dtype=dtype)), put(as_packed(ones))
        bias = put(values(n, seed=i + 2, dtype=dtype)) if i % 2 else None
        groups = None
        if named:
            groups = torch.randint(0, samples, (rows,), generator=generator(i))
        with poisoned_memory():
            got = ops.masked_linear(x, put(spoiled), active, bias, groups, backend="cuda")
        plain = ops.masked_linear(x, weight, active, bias, groups, backend="reference")
        exact = ops.masked_linear(
            x.double(), weight.double(), active, None if bias is None else bias.double(), groups,
            backend="reference",
        )  # fmt: skip
        assert_within_budget(got, plain, exact)


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, x = values(37, 131), values(8, 131)
    active = as_packed(mask(8, 37, 131))
    together = ops.masked_linear(x, weight, active, backend="cuda")
    for i in range(8):
        alone = ops.masked_linear(x[i : i + 1], weight, active[i], backend="cuda")
        assert torch.equal(alone, together[i : i + 1])


def test_other_strides_and_nothing_to_do() -> None:
    weight, x = values(10, 16), values(2, 16)
    active = ops.pack(mask(10, 16))
    want = ops.masked_linear(x, weight, active, backend="cuda")
    got = ops.masked_linear(non_contiguous(x), weight.T.clone().T, active, backend="cuda")
    assert torch.equal(got, want)
    empty = torch.empty(0, dtype=torch.uint8)
    assert ops.masked_linear(x[:0], weight, active, backend="cuda").shape == (0, 10)
    assert ops.masked_linear(x, weight[:0], empty, backend="cuda").shape == (2, 0)
    bias = values(10)
    got = ops.masked_linear(x[:, :0], weight[:, :0], empty, bias, backend="cuda")
    assert torch.equal(got, bias.expand(2, 10))


def test_a_row_that_names_no_mask_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU indices are not checked: nothing outside the masks is read."""
    monkeypatch.setattr("fastmask.ops._checks.in_range", lambda _groups, _samples: None)
    active = as_packed(mask(3, 10, 16))
    groups = torch.tensor([0, 3, -1, 2, 2**40])
    y = ops.masked_linear(values(5, 16), values(10, 16), active, None, groups, backend="cuda")
    assert y.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not y[[0, 3]].isnan().any()


@pytest.mark.usefixtures("auto_takes_cuda")
def test_auto_takes_few_rows_and_leaves_gradients() -> None:
    def taken(op: str, rows: int = 0, function: str | None = None) -> str:
        module = _backend.resolve(op, "auto", CPU, torch.float32, function, rows)
        return module.__name__.rpartition(".")[2]

    assert [taken("masked_linear", rows) for rows in (1, 4, 5)] == ["cuda", "cuda", "reference"]
    assert [taken("compressed_linear", rows) for rows in (16, 17)] == ["cuda", "reference"]
    for function in ("grad_input", "grad_weight"):
        assert taken("masked_linear", function=function) == "reference"
    x = values(2, 16).requires_grad_()
    ops.masked_linear(x, values(10, 16), ops.pack(mask(10, 16))).sum().backward()
    assert x.grad is not None


def test_gradients_are_refused_by_name() -> None:
    weight, active = values(10, 16), ops.pack(mask(10, 16))
    x = values(2, 16).requires_grad_()
    y = ops.masked_linear(x, weight, active, backend="cuda")
    with pytest.raises(BackendUnavailable, match="its masked_linear has no grad_input"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_compressed_linear(rows: int, dtype: torch.dtype, put: Put) -> None:
    for i, (n, k) in enumerate([*SHAPES, (300, 3), (17, 1056)]):
        ones = mask(n, k, seed=i, density=(0.5, 0.0, 1.0, 0.1)[i % 4])
        active, weight = put(ops.pack(ones)), values(n, k, seed=i, dtype=dtype)
        kept, x = put(compress(weight, active)), put(values(rows, k, seed=i + 1, dtype=dtype))
        bias = put(values(n, seed=i + 2, dtype=dtype)) if i % 2 else None
        with poisoned_memory():
            got = compressed_linear(x, kept, active, n, bias, backend="cuda")
        plain = compressed_linear(x, kept, active, n, bias, backend="reference")
        wide = None if bias is None else bias.double()
        exact = compressed_linear(x.double(), kept.double(), active, n, wide, backend="reference")
        assert_within_budget(got, plain, exact)


def test_compressed_linear_of_more_rows_than_a_second_axis_takes() -> None:
    """Four rows a block, 65,535 blocks: axes other than the first have no more."""
    x, weight = values(4 * 65536, 1), torch.full((1, 1), 3.0)
    bits = ops.pack(torch.ones(1, 1, dtype=torch.bool), backend="reference")
    y = compressed_linear(x, compress(weight, bits), bits, 1, backend="cuda")
    assert torch.equal(y, 3 * x)


def test_few_ones_and_all_bits_add_up_alike() -> None:
    """A row is the same whether its lanes go from one to one or, for one lane's sake, through all bits."""
    ones = mask(2, 1024, density=0.2)
    weight, x = values(2, 1024, dtype=torch.bfloat16), values(1, 1024, dtype=torch.bfloat16)
    few = ops.pack(ones)
    y = compressed_linear(x, compress(weight, few), few, 2, backend="cuda")
    ones[:, :32], weight[:, :32] = True, 0
    many = ops.pack(ones)
    first = torch.where(mask(2, 1024, density=0.2)[:, :32], values(2, 1024)[:, :32].bfloat16(), 0)
    weight[:, :32] = first
    assert torch.equal(compressed_linear(x, compress(weight, many), many, 2, backend="cuda"), y)


def test_compressed_linear_with_nothing_to_do() -> None:
    empty, none = torch.empty(0, dtype=torch.uint8), torch.empty(0)
    bias = values(10)
    got = compressed_linear(torch.empty(2, 0), none, empty, 10, bias, backend="cuda")
    assert torch.equal(got, bias.expand(2, 10))
    bits = ops.pack(torch.ones(1, 16, dtype=torch.bool))
    assert compressed_linear(values(0, 16), values(16), bits, 1, backend="cuda").shape == (0, 1)
