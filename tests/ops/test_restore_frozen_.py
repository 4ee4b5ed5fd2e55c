"""restore_frozen_: frozen entries come back bit for bit, the others stay."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from promises import unusable
from torch import Tensor

from fastmask import ops
from fastmask.errors import BackendUnavailable
from fastmask.testing import (
    ADVERSARIAL_SHAPES,
    assert_same_bits,
    generator,
    mask,
    non_contiguous,
    opcheck,
    poisoned_memory,
    values,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_by_hand() -> None:
    param = torch.tensor([1.0, 2.0, 3.0])
    frozen = ops.pack(torch.tensor([True, False, True]))
    ops.restore_frozen_([param], [torch.tensor([-0.0, 8.0, float("nan")])], [frozen])
    assert_same_bits(param, torch.tensor([-0.0, 2.0, float("nan")]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ADVERSARIAL_SHAPES, (), (0, 3), (2, 3, 5, 7)])
def test_selects_as_integers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any bits, signalling NaNs among them, on both sides of the selection."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(torch.Size(shape).numel())
    drawn = torch.randint(
        0, 256, (2 * count * size,), dtype=torch.uint8, generator=generator(0), device="cpu"
    )
    param, saved = drawn.to(torch.get_default_device()).view(dtype).view(2, *shape).unbind()
    m = mask(*shape)
    kept = param.clone()
    with poisoned_memory():
        ops.restore_frozen_([param], [saved], [ops.pack(m)])
    assert_same_bits(param, saved, where=m)
    assert_same_bits(param, kept, where=~m)


def test_many_tensors_strides_and_none() -> None:
    m = mask(37, 45)
    old, new = values(37, 45), values(37, 45, seed=1)
    params = [non_contiguous(new), new.T.contiguous().T, new.clone()]
    ops.restore_frozen_(params, [old, non_contiguous(old), old], [ops.pack(m), ops.pack(m), None])
    for param in params[:2]:
        assert_same_bits(param, torch.where(m, old, new))
    assert_same_bits(params[2], new)
    ops.restore_frozen_(params[2:], [old], None)
    assert_same_bits(params[2], new)
    ops.restore_frozen_([], [], None)


def test_parameters_that_require_grad_and_autograd_notices() -> None:
    param = values(3, 4).requires_grad_()
    y = param.square().sum()
    ops.restore_frozen_([param], [torch.zeros(3, 4)], [ops.pack(torch.ones(3, 4).bool())])
    assert param.is_leaf and not param.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck() -> None:
    params, saved = [values(37, 45), values(131)], [values(37, 45, seed=1), values(131, seed=1)]
    for frozen in ([ops.pack(mask(37, 45)), None], [None, None]):
        opcheck(torch.ops.fastmask.restore_frozen_, (params, saved, frozen, "auto"))


def test_compiled_in_full_and_new_masks_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(param: Tensor, frozen: Tensor) -> Tensor:
        saved = param.clone()
        param.mul_(2)
        ops.restore_frozen_([param], [saved], [frozen])
        return param

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(3):
        frozen = ops.pack(mask(37, 45, seed=seed))
        assert_same_bits(compiled(values(37, 45), frozen), step(values(37, 45), frozen))
    assert counter.frame_count == 1


def test_what_it_refuses() -> None:
    p, bits = values(37, 45), ops.pack(mask(37, 45))

    def refuse(kind: type[Exception], match: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=match):
            ops.restore_frozen_(*args, **options)  # type: ignore[arg-type]

    refuse(TypeError, "params: expected a list", p, [p], [bits])
    refuse(TypeError, r"params\[0\]: expected dtype", [p.long()], [p.long()], [bits])
    refuse(ValueError, r"params\[0\]: .* expanded", [p[:1].expand(37, 45)], [p], [bits])
    refuse(ValueError, "saved: expected 1 elements", [p], [], [bits])
    refuse(ValueError, r"saved\[0\]: expected shape \(37, 45\)", [p], [p[0]], [bits])
    refuse(TypeError, r"saved\[0\]: expected dtype", [p], [p.double()], [bits])
    refuse(ValueError, r"frozen\[0\]: expected shape \(216,\)", [p], [p], [bits[:-8]])
    refuse(TypeError, r"frozen\[0\]: expected packed bits", [p], [p], [mask(37, 45)])
    refuse(
        BackendUnavailable, f"'{unusable()}' cannot be used", [p], [p], [bits], backend=unusable()
    )
