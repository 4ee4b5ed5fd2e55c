"""Register one op with torch.library: schema, implementation for every device, fake, rule for vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define `fastmask::<schema>`; the implementation resolves its back end itself, when it runs.

    Under `torch.func.vmap` an op that returns tensors, but no list of them, runs once for each slice.
    """
    op = schema.split("(", 1)[0]
    name = f"fastmask::{op}"
    torch.library.define(name, schema[schema.index("(") :], tags=tuple(tags))
    torch.library.impl(name, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(name, fake)
    if not schema.endswith(("-> ()", "[]", "[])")):
        torch.library.register_vmap(name, _slice_by_slice(getattr(torch.ops.fastmask, op)))


def _slice_by_slice(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        pairs = list(zip(args, in_dims, strict=True))
        results = [
            op(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
