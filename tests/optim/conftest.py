"""Tests that compare bits with torch's own optimizers run on the back end that promises them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from masked_runs import reference_alone


@pytest.fixture
def torchs_bits() -> Iterator[None]:
    with reference_alone():
        yield
