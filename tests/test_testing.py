"""The oracle itself: it must fail where it should."""

from __future__ import annotations

import pytest
import torch

from fastmask.testing import (
    assert_same_bits,
    assert_within_budget,
    mask,
    non_contiguous,
    poisoned_memory,
    values,
)


def test_budget_is_twice_the_plain_error_and_an_ulp() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert_within_budget(exact.float(), exact.float(), exact)
    assert_within_budget((exact + 1.9 * eps).float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget((exact + 4 * eps).float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="NaN"):
        assert_within_budget(torch.tensor([1.0, float("nan")]), exact.float(), exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(exact, exact.float(), exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(exact[:1].float(), exact.float(), exact)


def test_bits_tell_zeros_and_nans_apart() -> None:
    zero, nan = torch.tensor([0.0, 1.0]), torch.tensor([float("nan")])
    assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        assert_same_bits(zero, torch.tensor([-0.0, 1.0]))
    assert_same_bits(zero, torch.tensor([-0.0, 1.0]), where=torch.tensor([False, True]))


def test_poison_is_in_fresh_memory_and_gone_afterwards() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(3).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8) == 91).all()
        assert torch.empty(3, dtype=torch.bool).all()
    assert torch.empty is not None
    assert "poisoned" not in torch.empty.__name__


def test_factories_repeat_and_differ_by_seed() -> None:
    assert torch.equal(values(3, 4), values(3, 4))
    assert not torch.equal(values(3, 4), values(3, 4, seed=1))
    assert abs(mask(10_000, density=0.2).float().mean() - 0.2) < 0.02
    x = values(3, 4)
    assert torch.equal(non_contiguous(x), x)
    assert not non_contiguous(x).is_contiguous()
