"""The CPU engine against the reference on whatever shapes, densities and options, on each instruction set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmask import _backend, ops
from fastmask.testing import assert_same_bits, assert_within_budget, mask, values

if _backend.missing("cpu") is not None:
    pytest.skip(f"no CPU engine: {_backend.missing('cpu')}", allow_module_level=True)

from fastmask import _cpu

sizes = st.integers(0, 700)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 150))
densities = st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
few = settings(max_examples=12, deadline=None)
methods = st.sampled_from(
    [
        {"method": "gumbel", "samples": 1},
        {"method": "gumbel", "samples": 3, "tau": 0.7},
        {"method": "threshold", "mu": 0.2},
        {"method": "topk", "density": 0.4},
    ]
)
readings = st.sampled_from([{}, {"off": "flip"}, {"scale": "rsqrt_density"}])


@pytest.fixture(autouse=True, scope="module", params=_cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _cpu.isa()
    _cpu.use(request.param)
    yield
    _cpu.use(before)


@few
@given(sizes, densities, seeds, dtypes, st.sampled_from([0.0, 0.3, -1e9]))
def test_bits(n: int, density: float, seed: int, dtype: torch.dtype, mu: float) -> None:
    ones, scores = mask(n, density=density, seed=seed), values(n, seed=seed, dtype=dtype)
    bits = ops.pack(ones, backend="cpu")
    assert torch.equal(bits, ops.pack(ones, backend="reference"))
    assert torch.equal(ops.unpack(bits, (n,), backend="cpu"), ones)
    assert int(ops.popcount(bits, backend="cpu")) == int(ones.sum())
    got = ops.pack(scores, mu=mu, backend="cpu")
    assert torch.equal(got, ops.pack(scores, mu=mu, backend="reference"))
    for call, options in ((ops.sample_mask, {"seed": seed}), (ops.topk_mask, {"density": density})):
        got = call(scores, **options, backend="cpu")
        assert torch.equal(got, call(scores, **options, backend="reference"))


@few
@given(shapes, st.integers(0, 20), densities, seeds, dtypes)
def test_products(
    shape: tuple[int, int], rows: int, density: float, seed: int, dtype: torch.dtype
) -> None:
    w, x = (
        values(*shape, seed=seed, dtype=dtype),
        values(rows, shape[1], seed=seed + 1, dtype=dtype),
    )
    g, ones = values(rows, shape[0], seed=seed + 2, dtype=dtype), mask(*shape, density=density)
    bits, exact = ops.pack(ones), torch.where(ones, w.double(), 0)
    kept = ops.compress(w, bits)

    def outputs(backend: str) -> list[Tensor]:
        found = []
        for compressed in (False, True):
            leaf = x.clone().requires_grad_()
            if compressed:
                y = ops.compressed_linear(leaf, kept, bits, shape[0], backend=backend)
            else:
                y = ops.masked_linear(leaf, w, bits, backend=backend)
            found += [y.detach(), torch.autograd.grad(y, leaf, g)[0]]
        return found

    want = [x.double() @ exact.T, g.double() @ exact] * 2
    for got, plain, truth in zip(outputs("cpu"), outputs("reference"), want, strict=True):
        assert_within_budget(got, plain, truth)


@few
@given(shapes, densities, seeds, dtypes, st.booleans(), st.booleans())
def test_steps(
    shape: tuple[int, int], density: float, seed: int, dtype: torch.dtype, up: bool, most: bool
) -> None:
    given_ = [values(*shape, seed=seed + i, dtype=dtype) for i in range(5)]
    frozen = mask(*shape, density=density, seed=seed)

    def stepped(backend: str, kind: torch.dtype) -> list[Tensor]:
        theta, g, m, v, largest = (t.to(kind).clone() for t in given_)
        v, largest = v.abs(), largest.abs()
        other, buf = theta.clone(), m.clone()
        ops.masked_adamw_([theta], [g], [m], [v], [largest] if most else None, [torch.tensor(2.0)],
                          [ops.pack(frozen)], lr=0.01, maximize=up, backend=backend)  # fmt: skip
        ops.masked_sgd_([other], [g], [buf], [ops.pack(frozen)], lr=0.1, momentum=0.9,
                        weight_decay=0.1, nesterov=most, maximize=up, backend=backend)  # fmt: skip
        return [theta, m, v, other, buf]

    exact = stepped("reference", torch.float64)
    results = zip(stepped("cpu", dtype), stepped("reference", dtype), exact, strict=True)
    for got, plain, want in results:
        assert_within_budget(got, plain, want)
        assert_same_bits(got, plain, where=frozen)


@few
@given(shapes, st.integers(1, 3), methods, readings, seeds, dtypes)
def test_learned_products(
    shape: tuple[int, int], rows: int, method: dict[str, Any], reading: dict[str, Any], seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    options = {**method, **reading, **({"seed": seed} if "samples" in method else {})}
    leaves = [values(rows * method.get("samples", 1), shape[1], seed=seed, dtype=dtype),
              values(*shape, seed=seed + 1, dtype=dtype), values(*shape, seed=seed + 2)]  # fmt: skip
    _as_the_reference(ops.learned_linear, leaves, options)
    _as_the_reference(lambda x, *rest, **how: ops.learned_weight(*rest, **how), leaves, options)


@few
@given(shapes, methods, st.sampled_from(["zero", "flip"]), seeds, dtypes)
def test_learned_weights_of_several_layers(
    shape: tuple[int, int], method: dict[str, Any], off: str, seed: int, dtype: torch.dtype
) -> None:
    options = {**method, "off": off}
    if options.pop("samples", None):
        options["seeds"] = [seed, seed + 1]

    def together(w: Tensor, scores: Tensor, **how: Any) -> Tensor:
        found = ops.learned_weights([w, w[:1]], [scores, scores[:1]], **how)
        return torch.cat([each.flatten() for each in found])

    # So many that the budget is of some of them: one product alone may have been rounded luckily.
    wide = (shape[0] + 8, shape[1] + 8)
    leaves = [values(*wide, seed=seed + 1, dtype=dtype), values(*wide, seed=seed + 2)]
    _as_the_reference(together, leaves, options)


@few
@given(shapes, st.integers(1, 3), methods, readings, seeds, dtypes)
def test_steps_of_learned_scores(
    shape: tuple[int, int], rows: int, method: dict[str, Any], reading: dict[str, Any], seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    samples, scores = method.get("samples", 1), values(*shape, seed=seed + 2)
    count, options = rows * samples, {"method": method["method"], **reading}
    if method["method"] == "gumbel":
        active = ops.sample_mask(scores, seed=seed, samples=samples)
        options |= {"seed": seed, "tau": method.get("tau", 1.0)}
    elif method["method"] == "threshold":
        active = ops.pack(scores, mu=method["mu"]).unsqueeze(0)
    else:
        active = ops.topk_mask(scores, method["density"]).unsqueeze(0)
    operands = [values(count, shape[0], seed=seed, dtype=dtype),
                values(count, shape[1], seed=seed + 1, dtype=dtype),
                values(*shape, seed=seed + 3, dtype=dtype)]  # fmt: skip

    def stepped(backend: str, wide: bool = False) -> list[Tensor]:
        kind = torch.float64 if wide else torch.float32
        theta, momenta = scores.to(kind, copy=True), values(*shape, seed=seed + 4).to(kind)
        dy, x, w = (t.double() if wide else t for t in operands)
        ops.learned_linear_step_(dy, x, w, theta, active, momenta, lr=0.1, momentum=0.9,
                                 weight_decay=0.01, **options, backend=backend)  # fmt: skip
        return [theta, momenta]

    found = (stepped("cpu"), stepped("reference"), stepped("reference", wide=True))
    for got, plain, exact in zip(*found, strict=True):
        assert_within_budget(got, plain, exact)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3]), methods, readings,
       seeds, dtypes)  # fmt: skip
def test_learned_convolutions(
    per: int, images: int, inner: int, side: int, method: dict[str, Any], reading: dict[str, Any],
    seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    options = {**method, **reading, **({"seed": seed} if "samples" in method else {})}
    shape = (2 * per, inner, side, side)
    leaves = [values(images * method.get("samples", 1), 2 * inner, 6, 5, seed=seed, dtype=dtype),
              values(*shape, seed=seed + 1, dtype=dtype), values(*shape, seed=seed + 2)]  # fmt: skip
    how = {"padding": side // 2, "stride": 2, "groups": 2}
    _as_the_reference(ops.learned_conv2d, leaves, {**options, **how})
    bits = ops.pack(mask(*shape, seed=seed))
    _as_the_reference(lambda x, w, **rest: ops.masked_conv2d(x, w, bits, **rest), leaves[:2], how)


def _as_the_reference(
    op: Callable[..., Tensor], leaves: list[Tensor], options: dict[str, Any]
) -> None:
    """Outputs and all gradients are within the error budget."""

    def results(backend: str, wide: bool = False) -> tuple[Tensor, ...]:
        own = [(t.double() if wide else t.clone()).requires_grad_() for t in leaves]
        y = op(*own, **options, backend=backend)
        g = values(*y.shape, seed=3, dtype=leaves[0].dtype).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, own, g, allow_unused=True)

    found = (results("cpu"), results("reference"), results("reference", wide=True))
    for got, plain, exact in zip(*found, strict=True):
        if exact is not None:
            assert_within_budget(got, plain, exact)


@few
@given(st.lists(st.integers(0, 300), max_size=4), densities, seeds, dtypes)
def test_selection(numbers: list[int], density: float, seed: int, dtype: torch.dtype) -> None:
    weights = [values(n, seed=seed + n, dtype=dtype) for n in numbers]
    masks = [mask(n, density=density, seed=seed + n) for n in numbers]
    bits = [ops.pack(each) for each in masks]
    selected = ops.masked_weights(weights, bits, backend="cpu") if weights else []
    changed = [-w for w in weights]
    ops.restore_frozen_(changed, weights, bits, backend="cpu")
    for w, on, got, back in zip(weights, masks, selected, changed, strict=True):
        assert_same_bits(got, torch.where(on, w, 0))
        assert_same_bits(back, torch.where(on, w, -w))


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 << 30,
    reason="needs 6 GiB of free memory",
)
def test_more_than_two_to_the_thirty_first_elements() -> None:
    if _cpu.isa() != _cpu.isas()[0]:
        pytest.skip("once, on the fastest instruction set: half a minute and more")
    n = 2**31 + 77
    ones = torch.zeros(n, dtype=torch.bool)
    ones[:: 2**20 + 7] = True
    ones[-1] = True
    bits = ops.pack(ones, backend="cpu")
    assert int(ops.popcount(bits, backend="cpu")) == int(torch.count_nonzero(ones))
    back = ops.unpack(bits, (n,), backend="cpu")
    assert torch.equal(back, ones)


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 7 << 30,
    reason="needs 7 GiB of free memory",
)
def test_a_product_with_more_than_two_to_the_thirty_first_weights() -> None:
    if _cpu.isa() != _cpu.isas()[0]:
        pytest.skip("once, on the fastest instruction set")
    n, k = 2**18 + 3, 2**13 + 64
    assert n * k > 2**31
    weight = torch.zeros(n, k, dtype=torch.bfloat16)
    bits = torch.zeros(-(-n * k // 64) * 8, dtype=torch.uint8)
    # Rows before, about and past 2**31 entries; of their two weights the first is masked out.
    rows = torch.tensor([0, 2**31 // k - 1, 2**31 // k, 2**31 // k + 1, n - 1])
    for i, row in enumerate(rows.tolist()):
        weight[row, 5], weight[row, k - 1] = 64.0, float(i + 1)
        bits[(row * k + k - 1) // 8] = 1 << (k - 1) % 8
    x = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16).expand(2, k)
    want = torch.zeros(2, n)
    want[:, rows] = torch.stack([torch.arange(1.0, 6.0), 2 * torch.arange(1.0, 6.0)])
    for b in (1, 2):
        got = ops.masked_linear(x[:b], weight, bits, backend="cpu")
        assert torch.equal(got.float(), want[:b])
    leaf = x[:1].clone().requires_grad_()
    y = ops.masked_linear(leaf, weight, bits, backend="cpu")
    (dx,) = torch.autograd.grad(y, leaf, want[:1].bfloat16())
    assert dx[0, k - 1] == 1 + 4 + 9 + 16 + 25 and int(dx.count_nonzero()) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 << 30,
    reason="needs 12 GiB of free memory",
)
def test_a_step_beyond_two_to_the_thirty_first_elements() -> None:
    """Of one bfloat16 tensor, dense and with momentum of the few free entries alone."""
    if _cpu.isa() != _cpu.isas()[0]:
        pytest.skip("once, on the fastest instruction set: a minute")
    n = 2**31 + 77
    bits = torch.full((-(-n // 64) * 8,), 255, dtype=torch.uint8)
    bits[-6:] = 0  # of the last word 13 bits count
    bits[-7] = 31
    free = torch.tensor([3, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    for place in free.tolist():
        bits[place // 8] &= 255 - (1 << place % 8)
    weight, grad = (torch.ones(n, dtype=torch.bfloat16) for _ in range(2))
    for momenta in (None, [torch.ones(5, dtype=torch.bfloat16)]):
        mu = 0.0 if momenta is None else 1.0
        before = weight[free].clone()
        ops.masked_sgd_([weight], [grad], momenta, [bits], lr=0.25, momentum=mu, backend="cpu")
        assert torch.equal(weight[free], before - 0.25 * (1 + mu))
        assert int(torch.count_nonzero(weight == 1)) == n - 5
