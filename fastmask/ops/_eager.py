"""Whether a call needs torch's dispatcher: what it costs, tens of microseconds, is felt in small layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter


def unwatched() -> bool:
    """Whether nothing sees or changes this thread's ops: no compiler, tracer, transform, mode or profiler."""
    c = torch._C
    return not (
        torch.compiler.is_compiling()
        or c._are_functorch_transforms_active()
        or c._len_torch_function_stack()
        or c._len_torch_dispatch_stack()
        or c._get_tracing_state()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or c._is_any_autocast_enabled()
    )


def ordinary(value: Tensor) -> bool:
    """Whether `value` is plain memory of the CPU: no subclass, no other layout, no lazy negation."""
    kind = type(value)
    return (
        (kind is Tensor or kind is Parameter)
        and value.is_cpu
        and value.layout is torch.strided
        and not value.is_neg()
    )


def plain_call(*tensors: Tensor | None) -> bool:
    """Whether nothing sees this thread's ops and all that is given is plain memory of the CPU."""
    return unwatched() and all(t is None or ordinary(t) for t in tensors)
