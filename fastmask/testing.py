"""What proves an op: input factories, the error-budget oracle, poisoned memory. For tests and benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# (N, K) of weights that have caught kernels out: one element, odd sizes, rows on and off a word, a tail
# shorter than any vector, more rows than columns and the other way round.
ADVERSARIAL_SHAPES: tuple[tuple[int, int], ...] = (
    (1, 1),
    (1, 7),
    (5, 1),
    (3, 8),
    (7, 64),
    (37, 45),
    (45, 131),
    (131, 37),
    (64, 128),
    (10, 1280),
)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that no test depends on another's draws."""
    return torch.Generator().manual_seed(seed)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the default device, the same on every device."""
    drawn = torch.randn(shape, generator=generator(seed), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def mask(*shape: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """A bool mask of about this density on the default device, the same on every device."""
    drawn = torch.rand(shape, generator=generator(seed), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device()) < density


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values with every other element of a larger buffer: no stride is 1."""
    buffer = tensor.new_empty((*tensor.shape, 2))
    buffer[..., 0] = tensor
    return buffer[..., 0]


def assert_within_budget(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Assert `err(actual, exact) <= 2 * err(reference, exact) + eps * max|exact|`, errors as maxima.

    Args:
        actual: the result under test, in its dtype.
        reference: the plain computation in that dtype, whose rounding is the measure.
        exact: the same in float64.

    Raises:
        AssertionError: shape, dtype, NaN pattern or error is off; the message has the figures.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, want {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"dtype {actual.dtype}, want {reference.dtype}"
    assert exact.dtype == torch.float64, f"exact must be float64, got {exact.dtype}"
    if actual.numel() == 0:
        return
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN where there should be none, or none"
    got, want = actual.double().nan_to_num(), exact.nan_to_num()
    error = (got - want).abs().max().item()
    plain = (reference.double().nan_to_num() - want).abs().max().item()
    budget = 2 * plain + torch.finfo(actual.dtype).eps * want.abs().max().item()
    assert error <= budget, (
        f"error {error:.3e} exceeds the budget {budget:.3e} (plain computation: {plain:.3e})"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Assert that two tensors are equal as integers, so that NaN and -0.0 count too."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, want {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, want {tuple(expected.shape)}"
    )
    differ = as_integers(actual) != as_integers(expected)
    if where is not None:
        differ &= where
    assert not differ.any(), (
        f"{int(differ.sum())} of {differ.numel()} elements differ in their bits"
    )


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a floating tensor as integers of its width."""
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return tensor.detach().contiguous().view(widths[tensor.element_size()])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like` and `Tensor.new_empty` return with NaN, integers with 91."""
    makers = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    with contextlib.ExitStack() as stack:
        for owner, name in makers:
            original = getattr(owner, name)

            def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> Tensor:
                fresh = _original(*args, **kwargs)
                with torch.no_grad():
                    return fresh.fill_(float("nan") if fresh.is_floating_point() else 91)

            stack.enter_context(mock.patch.object(owner, name, poisoned))
        yield


def opcheck(op: Any, args: Sequence[Any]) -> None:
    """Run `torch.library.opcheck` on an op's schema, fake and dynamic-shape tracing."""
    torch.library.opcheck(op, tuple(args))
