"""Register one op with torch.library: schema, implementation for every device, fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define `fastmask::<schema>`; the implementation resolves its back end itself, when it runs."""
    name = f"fastmask::{schema.split('(', 1)[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=tuple(tags))
    torch.library.impl(name, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(name, fake)
