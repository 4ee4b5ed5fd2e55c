"""The engine's products: each number of rows at which it changes its way, rows off a word, threads, tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastmask import _backend, ops
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

if _backend.missing("cpu") is not None:
    pytest.skip(f"no CPU engine: {_backend.missing('cpu')}", allow_module_level=True)

from fastmask import _cpu

# Each height of a tile, more tiles, half a panel and whole ones, more rows than are computed at once.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64, 70, 530)
# (N, K): rows that start within a byte, within a word, on a word; blocks of outputs and of depth with a rest;
# the last are too large to be read for each tile of x, in float32 and in bfloat16.
SHAPES = ((5, 7), (13, 48), (37, 45), (100, 272), (97, 320), (211, 601), (131, 1003))


@pytest.fixture(params=_cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _cpu.isa()
    _cpu.use(request.param)
    yield
    _cpu.use(before)


def run(
    x: Tensor, w: Tensor, active: Tensor, dy: Tensor, groups: Tensor | None = None
) -> list[Tensor]:
    """Output, gradient of x, gradient of w."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = ops.masked_linear(x, w, active, groups=groups, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


def plain(x: Tensor, w: Tensor, masks: Tensor, dy: Tensor, owner: Tensor) -> list[Tensor]:
    """The same as one product a mask, in the dtype of x."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = x.new_zeros(len(x), len(w))
    for s, one in enumerate(masks):
        rows = torch.nonzero(owner == s).squeeze(1)
        y = y.index_copy(0, rows, F.linear(x[rows], torch.where(one, w, 0)))
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_rows_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    w, m = values(n, k, seed=1, dtype=dtype), mask(n, k)
    active = ops.pack(m).unsqueeze(0)
    for b in ROWS:
        x, dy = values(b, k, seed=b, dtype=dtype), values(b, n, seed=2, dtype=dtype)
        owner = torch.zeros(b, dtype=torch.int64)
        reference = plain(x, w, m.unsqueeze(0), dy, owner)
        exact = plain(x.double(), w.double(), m.unsqueeze(0), dy.double(), owner)
        for got, want, best in zip(run(x, w, active, dy), reference, exact, strict=True):
            assert_within_budget(got, want, best)


@pytest.mark.parametrize("shape", [(37, 45), (100, 272)])
@pytest.mark.parametrize("rows", [6, 40, 200])
def test_uneven_tasks_and_one_that_has_no_rows(shape: tuple[int, int], rows: int) -> None:
    n, k = shape
    x, w, dy = values(rows, k), values(n, k, seed=1), values(rows, n, seed=2)
    masks = mask(4, n, k)
    active = torch.stack([ops.pack(one) for one in masks])
    owner = torch.arange(rows) * 7 % 11 % 3  # never the fourth
    reference = plain(x, w, masks, dy, owner)
    exact = plain(x.double(), w.double(), masks, dy.double(), owner)
    for got, want, best in zip(run(x, w, active, dy, owner), reference, exact, strict=True):
        assert_within_budget(got, want, best)


@pytest.mark.parametrize("rows", [3, 24, 100])
def test_no_bit_depends_on_the_threads(rows: int) -> None:
    n, k, before = 300, 601, torch.get_num_threads()
    x, w, dy = values(rows, k), values(n, k, seed=1), values(rows, n, seed=2)
    active, results = ops.pack(mask(n, k)).unsqueeze(0), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The gradient of w is torch's own product.
            results.append(run(x, w, active, dy)[:2])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


def test_a_row_is_the_same_alone_and_among_few() -> None:
    x, w, active = values(8, 601), values(37, 601, seed=1), ops.pack(mask(37, 601))
    together = ops.masked_linear(x, w, active, backend="cpu")
    for i in range(8):
        alone = ops.masked_linear(x[i : i + 1], w, active, backend="cpu")
        assert_same_bits(alone, together[i : i + 1])


@pytest.mark.parametrize("rows", [2, 40])
def test_what_is_masked_out_may_be_anything(rows: int) -> None:
    n, k = 50, 90
    x, dy, m = values(rows, k), values(rows, n, seed=2), mask(n, k)
    w = values(n, k, seed=1)
    active = ops.pack(m).unsqueeze(0)
    clean = run(x, torch.where(m, w, 0), active, dy)
    for bad in (float("nan"), float("inf")):
        for got, want in zip(run(x, torch.where(m, w, bad), active, dy), clean, strict=True):
            assert_same_bits(got, want)


class Seen(TorchDispatchMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learned", [False, True])
def test_a_call_that_nobody_watches_has_the_bits_of_the_op(learned: bool) -> None:
    x, w, b = values(2, 3, 45), values(37, 45, seed=1), values(37, seed=2)
    active, dy = ops.pack(mask(37, 45)), values(2, 3, 37, seed=3)
    if learned:
        x, w, b = (t.requires_grad_() for t in (x, w, b))

    def results() -> list[Tensor]:
        y = ops.masked_linear(x, w, active, b, backend="cpu")
        return [y.detach(), *(torch.autograd.grad(y, (x, w, b), dy) if learned else ())]

    alone = results()
    with Seen() as seen:
        watched = results()
    assert "fastmask::masked_linear" in seen.names, "a mode sees the op"
    for got, want in zip(alone, watched, strict=True):
        assert_same_bits(got, want)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results()
    assert any(e.key == "fastmask::masked_linear" for e in profile.key_averages())


@pytest.mark.parametrize("seed", [7, None])
def test_a_learned_call_that_nobody_watches_has_the_bits_of_the_op(seed: int | None) -> None:
    leaves = values(6, 45), values(37, 45, seed=1), values(37, 45, seed=2), values(37, seed=3)
    x, w, scores, bias = (t.requires_grad_() for t in leaves)
    dy = values(6, 37, seed=4)

    def results() -> list[Tensor]:
        torch.manual_seed(5)
        y = ops.learned_linear(x, w, scores, seed=seed, samples=2, bias=bias, backend="cpu")
        return [y.detach(), *torch.autograd.grad(y, (x, w, scores, bias), dy)]

    alone = results()
    with Seen() as seen:
        watched = results()
    assert {"fastmask::learned_linear", "fastmask::learned_linear_grad"} <= set(seen.names)
    for got, want in zip(alone, watched, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"off": "flip"}, {"scale": "rsqrt_density"}], ids=str)
def test_flipped_and_rescaled_weights_within_budget(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    def step(leaves: list[Tensor], dy: Tensor, backend: str) -> list[Tensor]:
        x, w, scores = (t.clone().requires_grad_() for t in leaves)
        y = ops.learned_linear(x, w, scores, seed=3, samples=3, **options, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, (x, scores), dy)]

    for n, k in ((5, 7), (37, 45), (211, 601)):
        for b in (3, 12, 48, 210):
            leaves = [
                values(b, k, dtype=dtype),
                values(n, k, seed=1, dtype=dtype),
                values(n, k, seed=2),
            ]
            dy = values(b, n, seed=4, dtype=dtype)
            exact = step([t.double() for t in leaves], dy.double(), "reference")
            plain, got = step(leaves, dy, "reference"), step(leaves, dy, "cpu")
            for ours, other, best in zip(got, plain, exact, strict=True):
                assert_within_budget(ours, other, best)


def test_a_mask_of_almost_all_within_budget() -> None:
    n, k, rows = 256, 256, 100
    m = mask(n, k, density=0.99)
    owner = torch.zeros(rows, dtype=torch.int64)
    for seed in range(4):
        x, w, dy = values(rows, k, seed=seed), values(n, k, seed=50 + seed), values(rows, n)
        got = run(x, w, ops.pack(m).unsqueeze(0), dy)
        reference = plain(x, w, m.unsqueeze(0), dy, owner)
        exact = plain(x.double(), w.double(), m.unsqueeze(0), dy.double(), owner)
        for one, other, best in zip(got, reference, exact, strict=True):
            assert_within_budget(one, other, best)


def test_forward_mode_is_refused_rather_than_wrong() -> None:
    x, w, active = values(2, 45), values(37, 45, seed=1), ops.pack(mask(37, 45))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward AD|jvp"):
            ops.masked_linear(dual, w, active, backend="cpu")


def test_lazily_negated_rows_are_what_they_say() -> None:
    x, w, active = values(4, 45), values(37, 45, seed=1), ops.pack(mask(37, 45))
    negated = torch.imag(torch.complex(torch.zeros_like(x), x).conj())
    assert negated.is_neg()
    want = ops.masked_linear(-x, w, active, backend="cpu")
    assert_same_bits(ops.masked_linear(negated, w, active, backend="cpu"), want)


@pytest.mark.parametrize("rows", [1, 9, 70])
def test_under_ones_alone_all_bits_are_torchs(rows: int) -> None:
    x, w, dy = values(rows, 90), values(50, 90, seed=1), values(rows, 50, seed=2)
    ones = torch.ones(1, 50, 90, dtype=torch.bool)
    owner = torch.zeros(rows, dtype=torch.int64)
    got = run(x, w, ops.pack(ones[0]).unsqueeze(0), dy)
    for one, other in zip(got, plain(x, w, ones, dy, owner), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("rows", [1, 8, 20])
def test_a_gradient_over_many_outputs_within_budget(rows: int) -> None:
    x, w, m = values(rows, 64), values(4096, 64, seed=1), mask(4096, 64)
    dy, owner = values(rows, 4096, seed=2), torch.zeros(rows, dtype=torch.int64)
    got = run(x, w, ops.pack(m).unsqueeze(0), dy)[1]
    reference = plain(x, w, m.unsqueeze(0), dy, owner)[1]
    exact = plain(x.double(), w.double(), m.unsqueeze(0), dy.double(), owner)[1]
    assert_within_budget(got, reference, exact)


def test_halves_in_more_than_one_block() -> None:
    n, k, rows = 130, 16_401, 20  # 64 rows of w make a block
    x, w = values(rows, k, dtype=torch.bfloat16), values(n, k, seed=1, dtype=torch.bfloat16)
    masks, owner = mask(2, n, k), torch.arange(rows) % 2
    active = torch.stack([ops.pack(one) for one in masks])
    dy = values(rows, n, seed=2, dtype=torch.bfloat16)
    got = ops.masked_linear(x, w, active, groups=owner, backend="cpu")
    reference = plain(x, w, masks, dy, owner)[0]
    assert_within_budget(
        got, reference, plain(x.double(), w.double(), masks, dy.double(), owner)[0]
    )


def test_defaults_of_torch_do_not_reach_it() -> None:
    x, w, m = values(9, 45), values(37, 45, seed=1), mask(37, 45)
    scores, active, dy = (
        values(37, 45, seed=2).requires_grad_(),
        ops.pack(m).unsqueeze(0),
        values(9, 37),
    )
    calls = (
        lambda: run(x, w, active, dy),
        lambda: torch.autograd.grad(
            ops.learned_linear(x, w, scores, seed=3, backend="cpu"), scores, dy
        ),
        lambda: [ops.pack(w, 0.1, backend="cpu"), ops.topk_mask(w, 0.3, backend="cpu")],
    )
    for call in calls:
        want = call()
        torch.set_default_dtype(torch.float64)
        try:
            got = call()
        finally:
            torch.set_default_dtype(torch.float32)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)


def test_scores_learn_under_autocast_as_without() -> None:
    x, w, scores = values(6, 45), values(37, 45, seed=1), values(37, 45, seed=2).requires_grad_()
    dy = values(6, 37, seed=3, dtype=torch.bfloat16)
    low = [t.to(torch.bfloat16) for t in (x, w)]
    (want,) = torch.autograd.grad(
        ops.learned_linear(*low, scores, seed=3, backend="cpu"), scores, dy
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.learned_linear(x, w, scores, seed=3, backend="cpu")
        (got,) = torch.autograd.grad(y, scores, dy)
    assert_same_bits(got, want)
