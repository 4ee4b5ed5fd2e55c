"""Tensors, layers and optimizers in states that no room of the package has a test of its own for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmask
from fastmask import (
    BitMask,
    FixedMask,
    GumbelMask,
    MaskedConv2d,
    MaskedLinear,
    ThresholdMask,
    _backend,
    ops,
)
from fastmask.nn import set_batch_norm_policy
from fastmask.optim import MaskedSGD, protect
from fastmask.testing import assert_same_bits, mask, values

METHODS: list[dict[str, Any]] = [
    {"method": "gumbel", "seed": 1},
    {"method": "threshold"},
    {"method": "topk", "density": 0.5},
]


def spoilt_layer(bits: Tensor) -> dict[str, Tensor]:
    layer = MaskedLinear(4, 3, mask=FixedMask(BitMask.ones((3, 4))))
    return {**layer.state_dict(), "mask.bits": bits}


@pytest.mark.parametrize(
    "bits, said",
    [
        (
            torch.full((8,), 255, dtype=torch.uint8),
            "expected padding bits after element 11 to be 0",
        ),
        (torch.ones(8), "expected dtype torch.uint8, got torch.float32"),
    ],
)
def test_bits_are_checked_when_a_checkpoint_is_loaded(bits: Tensor, said: str) -> None:
    layer = MaskedLinear(4, 3, mask=FixedMask(BitMask.zeros((3, 4))))
    with pytest.raises(RuntimeError, match=rf"mask\.bits: {said}"):
        layer.load_state_dict(spoilt_layer(bits))
    assert layer.mask.density == 0, "the mask stays as it was"
    layer.load_state_dict(spoilt_layer(BitMask.ones((3, 4)).bits))
    assert layer.mask.density == 1


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_of_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    w, bits = torch.zeros(3, 4).to(dtype), ops.pack(mask(3, 4))
    x, scores = torch.zeros(2, 4), torch.zeros(3, 4)
    said = f"weight: expected dtype float32, .*got {dtype}"
    with pytest.raises(TypeError, match=said):
        ops.masked_linear(x, w, bits)
    with pytest.raises(TypeError, match=said):
        ops.learned_linear(x, w, scores, seed=1)
    with pytest.raises(TypeError, match=said):
        ops.masked_conv2d(torch.zeros(1, 4, 1, 1), w.view(3, 4, 1, 1), bits)
    with pytest.raises(TypeError, match=r"params\[0\]: expected dtype float32"):
        ops.restore_frozen_([w], [w], [bits])


def test_weights_of_other_dimensions_are_refused_by_name() -> None:
    for dead in (torch.tensor(1.0), torch.ones(4), torch.ones(3, 4, 1)):
        with pytest.raises(ValueError, match=r"weight: expected shape \(N, K\), got"):
            ops.masked_linear(torch.zeros(2, 4), dead, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., 4\) .* got \(\)"):
        ops.masked_linear(torch.tensor(1.0), torch.ones(3, 4), ops.pack(mask(3, 4)))


def test_sizes_beyond_2_to_the_31_are_counted_in_64_bits() -> None:
    """Shapes alone, on tensors without memory: offsets of kernels are another matter."""
    n = 2**33 + 3
    bits = ops.pack(torch.empty(n, dtype=torch.bool, device="meta"))
    assert bits.shape == (2**30 + 8,)
    assert ops.unpack(bits, (n,)).shape == (n,)
    assert ops.popcount(bits).dtype == torch.int64
    sampled = ops.sample_mask(torch.empty(2**17, 2**16, device="meta"), seed=1, samples=2)
    assert sampled.shape == (2, 2**30)
    x, w = torch.empty(2, 2**17, device="meta"), torch.empty(2**16, 2**17, device="meta")
    assert ops.masked_linear(x, w, sampled[0]).shape == (2, 2**16)


@pytest.mark.slow
def test_the_cpu_engine_counts_beyond_2_to_the_31() -> None:
    """2 GiB of bools; the reference needs several times as much."""
    if reason := _backend.missing("cpu"):
        pytest.skip(f"no CPU engine: {reason}")
    if (
        not hasattr(os, "sysconf")
        or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**33
    ):
        pytest.skip("less than 8 GiB of free memory")
    n = 2**31 + 70
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    ones = torch.zeros(n, dtype=torch.bool)
    ones[places] = True
    bits = ops.pack(ones, backend="cpu")
    assert int(ops.popcount(bits, backend="cpu")) == len(places)
    expected = torch.zeros_like(bits)
    for place in places.tolist():
        expected[place // 8] |= 1 << place % 8
    assert torch.equal(bits, expected)
    del ones
    assert ops.unpack(bits, (n,), backend="cpu")[places].all()


def test_on_the_meta_device_layers_give_shapes_and_masks_no_counts() -> None:
    x = torch.empty(2, 4, device="meta")
    for template in (GumbelMask(), ThresholdMask()):
        layer = MaskedLinear(4, 3, device="meta", mask=template)
        assert layer(x).shape == (2, 3) and layer.eval()(x).is_meta
    bits = BitMask.ones((3, 4), device="meta")
    assert "meta" in repr(bits)
    with pytest.raises(RuntimeError, match="meta"):
        bits.count()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_come_out_as_of_a_plain_layer(bad: float) -> None:
    """0 * NaN is NaN: the masked-out weight is read as 0, and what meets it is not hidden."""
    x, w, ones = values(6, 70), values(5, 70), mask(5, 70)
    x[2, 3] = bad
    plain = F.linear(x, torch.where(ones, w, 0.0))
    got = ops.masked_linear(x, w, ops.pack(ones))
    assert torch.equal(got.isnan(), plain.isnan()) and torch.equal(got.isinf(), plain.isinf())
    assert got[[0, 1, 3, 4, 5]].isfinite().all() and not got[2].isfinite().any()
    scores = torch.where(ones, 1.0, -1.0)
    learned = ops.learned_linear(x, w, scores, method="threshold")
    assert torch.equal(learned.isnan(), plain.isnan())


def test_denormal_and_signed_zero_weights_and_scores_are_numbers_like_others() -> None:
    small = torch.tensor([[1e-40, -1e-40, -0.0, 0.0]])
    bits = ops.pack(torch.tensor([[True, True, True, True]]))
    # 2^100 * 1e-40 is an ordinary number: a kernel that flushes denormals would give 0.
    x = torch.full((4, 4), 2.0**100).tril().triu()
    assert_same_bits(ops.masked_linear(x, small, bits), F.linear(x, small))
    assert ops.unpack(ops.pack(small, 0.0), (4,)).tolist() == [True, False, False, False]
    assert ops.unpack(ops.topk_mask(small, 0.25), (4,)).tolist() == [True, False, False, False]


def test_operands_that_share_memory() -> None:
    """What is read is read before it is written."""
    for shared in (values(70), values(70, seed=1)):
        expected = shared - 0.1 * shared
        ops.masked_sgd_([shared], [shared], None, None, lr=0.1)
        torch.testing.assert_close(shared, expected, rtol=1e-6, atol=0)
    same = values(70)
    kept = same.clone()
    ops.restore_frozen_([same], [same], [ops.pack(mask(70))])
    assert_same_bits(same, kept)
    buffer = values(80)
    ones, kept = mask(40), buffer.clone()
    # Two halves of one buffer: what lies beside a parameter is not touched.
    ops.restore_frozen_([buffer[:40]], [buffer[40:]], [ops.pack(ones)])
    assert_same_bits(buffer[:40], torch.where(ones, kept[40:], kept[:40]))
    assert_same_bits(buffer[40:], kept[40:])


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_weights_of_inference_mode_serve_where_no_gradient_is_asked_for(
    options: dict[str, Any],
) -> None:
    with torch.inference_mode():
        w = values(3, 4)
    x, scores = values(2, 4), values(3, 4, seed=1)
    want = ops.learned_linear(x, w.clone(), scores, **options)
    with torch.no_grad():
        assert_same_bits(ops.learned_linear(x, w, scores.requires_grad_(), **options), want)
    # torch's own refusal, the same as for a plain layer.
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ops.learned_linear(x, w, scores, **options)


def test_a_view_made_without_gradients_passes_none_to_its_base() -> None:
    base = values(6, 4).requires_grad_()
    with torch.no_grad():
        view = base[:3]
    x = values(2, 4).requires_grad_()
    ops.masked_linear(x, view, ops.pack(mask(3, 4))).sum().backward()
    assert base.grad is None and x.grad is not None
    ops.masked_linear(x, base[:3], ops.pack(mask(3, 4))).sum().backward()
    assert base.grad is not None and not base.grad[3:].any()


@pytest.mark.parametrize("conv", [False, True])
def test_one_sample_and_none_go_through_held_batch_norms(conv: bool) -> None:
    layers: list[nn.Module] = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    if conv:
        layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers)
    fastmask.mask_(model, GumbelMask())
    shape = (4, 1, 1) if conv else (4,)
    # torch's own refusal: one value a channel has no variance.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(values(1, *shape))
    set_batch_norm_policy(model, "frozen")
    for n in (0, 1):
        y = model.train()(values(n, *shape))
        assert y.shape == (n, *shape)
        y.sum().backward()


def test_an_optimizer_built_before_masking_holds_the_same_parameters() -> None:
    """Nothing stale: weights are frozen and stay, biases learn; scores are new and have to be added."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    fastmask.mask_(model, GumbelMask())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.add_param_group({"params": [m.mask.logits for m in model]})
    model(values(3, 4)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (not name.endswith("weight")), name
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_parameter_in_two_groups_is_refused_as_by_torch() -> None:
    p = nn.Parameter(values(4))
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        MaskedSGD([{"params": [p]}, {"params": [p]}], lr=0.1)


def test_a_loss_that_is_no_number_moves_no_frozen_entry() -> None:
    p, frozen = nn.Parameter(values(64)), BitMask.from_bool(mask(64))
    before, ones = p.detach().clone(), frozen.to_bool()
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5)
    with protect(optimizer, {p: frozen}):
        for step in range(3):
            loss = (p * (float("nan") if step == 1 else 1.0)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(p.detach(), before, where=ones)
    assert p.detach()[~ones].isnan().all(), (
        "what is free is the user's: it shows that the loss broke"
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_grouped_depthwise_padded_and_biasless_convolutions_are_taken(
    groups: int, padding_mode: str
) -> None:
    layer = nn.Conv2d(
        4, 4, 3, padding=1, groups=groups, bias=groups == 1, padding_mode=padding_mode
    )
    x = values(2, 4, 5, 5)
    want = layer(x).detach()
    masked = fastmask.mask_(nn.Sequential(layer), FixedMask(BitMask.ones(layer.weight.shape)))
    assert masked.converted == ("0",) and type(layer) is MaskedConv2d
    assert_same_bits(layer(x).detach(), want)


@pytest.mark.parametrize("learned", [False, True])
def test_in_shared_memory_it_computes_the_same(learned: bool) -> None:
    template = ThresholdMask("kaiming") if learned else FixedMask(BitMask.from_bool(mask(3, 4)))
    model = nn.Sequential(MaskedLinear(4, 3, mask=template))
    x = values(2, 4)
    want = model(x).detach()
    model.share_memory()
    assert all(t.is_shared() for t in [*model.parameters(), *model.buffers()])
    assert_same_bits(model(x).detach(), want)
