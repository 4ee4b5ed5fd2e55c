"""What the kernels compile to with no GPU: registers, stack, spills, tensor cores, rounding."""

from __future__ import annotations

import re

import pytest
import torch

from fastmask._triton import aot, launch
from fastmask._triton.cases import Case, cases
from fastmask.ops.sample_mask import reference

triton = pytest.importorskip("triton", reason="the package triton is not installed")
tl = triton.language

CASES = cases()
MACHINES: dict[tuple[str, int], list[aot.Machine]] = {}


def machines(case: Case, capability: int) -> list[aot.Machine]:
    """The kernels of a case, compiled once."""
    key = (str(case), capability)
    if key not in MACHINES:
        launches = aot.launches_of(case)
        MACHINES[key] = [aot.compiled(each, capability) for each in launches]
    return MACHINES[key]


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_kernel_spills(case: Case, capability: int) -> None:
    found = machines(case, capability)
    assert found
    for machine in found:
        assert machine.spills == 0 and machine.stack == 0, machine
        assert 0 < machine.registers <= 255, machine.registers
        # What a block may have without asking for more: 99 KiB fit all of sm_80 to sm_90.
        assert machine.shared <= 99 * 1024, machine.shared


def test_tensor_cores_multiply() -> None:
    """Every product of 16-bit tiles uses them; a forward on sm_90 reads the masked tile from registers."""
    from_registers = re.compile(r"\bHGMMA\.\S+ R\d+, R\d+, gdesc")
    kernels = set()
    for case in CASES:
        if "_linear" not in case.op or case.what.startswith("float32"):
            continue
        for capability in aot.CAPABILITIES:
            for machine in machines(case, capability):
                kernels.add(machine.kernel)
                if machine.kernel not in ("_few", "_add", "_popcount", "_window", "_add_selected"):
                    newest = "HGMMA" if capability == 90 else "HMMA"
                    assert all(newest in each for each in machine.tensor_core), (case, capability)
                    assert machine.tensor_core, (case, capability)
                if machine.kernel in ("_forward", "_drawn") and capability == 90:
                    assert from_registers.search(machine.sass), case
    products = {"_few", "_forward", "_grad_input", "_grad_weight", "_drawn", "_grad_scores"}
    assert kernels == products | {"_add", "_popcount", "_window", "_add_selected"}


PRODUCTS = ("_forward", "_grad_input", "_grad_weight", "_drawn", "_grad_scores")


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_tf32_only_where_torch_allows_it(
    kernel: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = {
        "_forward": "masked_linear-float32-B64", "_grad_input": "masked_linear-float32-B64-dx",
        "_grad_weight": "masked_linear-float32-S4-dw", "_drawn": "learned_linear-float32-gumbel-B64",
        "_grad_scores": "learned_linear-float32-gumbel-groups-ds",
    }  # fmt: skip
    case = next(c for c in CASES if str(c) == of[kernel])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    launch = next(each for each in aot.launches_of(case) if each.kernel.__name__ == kernel)
    for capability in aot.CAPABILITIES:
        machine = aot.compiled(launch, capability)
        assert machine.spills == 0, machine
        assert any("TF32" in name for name in machine.tensor_core) == (precision == "high")


@pytest.mark.parametrize(
    "case", ["masked_linear-float32-S4-dw", "learned_linear-float32-gumbel-ds"]
)
def test_sums_over_many_rows_are_added_tile_by_tile(case: str) -> None:
    """One running sum over thousands of rows errs some four times as much as one over tiles of 16."""
    for machine in machines(next(c for c in CASES if str(c) == case), 90):
        if machine.kernel in PRODUCTS:
            # An addition for each of the tile's entries, beside those of the products.
            assert len(re.findall(r"\badd(?:\.rn)?\.f32\b", machine.ptx)) >= 16, machine.kernel


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_thresholds_are_never_contracted(capability: int) -> None:
    for case in CASES:
        if case.op == "sample_mask" or str(case) in (
            "learned_conv2d-float32-gumbel",
            "learned_weights-float32",
            "learned_weights-bfloat16-last",
        ):
            for machine in machines(case, capability):
                assert not re.search(r"\bfma\.", machine.ptx), case
                assert re.search(r"\bdiv\.rn\.f32\b", machine.ptx), case
                assert not re.search(r"\bdiv\.(?:full|approx)", machine.ptx), case


# Constants of the threshold, each in a multiplication or an addition that could be contracted.
STEPS = (reference._LOG2E, reference._LN2_HIGH, reference._LN2_LOW, *reference._EXP, 2.0**24)


def constants_of(ptx: str, operations: str) -> set[int]:
    """Magnitudes, as bits, of the float32 constants in such instructions, those in registers too.

    The compiler may subtract a negated constant, so that signs do not count.
    """
    held = dict(re.findall(r"\bmov\.b32\s+(%\w+), (0f\w{8});", ptx))
    rounded = "" if operations == "fma" else r"\.rn"
    operands = " ".join(re.findall(rf"\b(?:{operations}){rounded}[.\w]*\s([^;]*);", ptx))
    named = re.sub(r"%\w+", lambda found: held.get(found[0], ""), operands)
    return {int(each, 16) & 0x7FFFFFFF for each in re.findall(r"\b0f(\w{8})", named)}


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_thresholds_within_a_product_are_never_contracted(capability: int) -> None:
    """A product in float32 is contracted there, the threshold before it is not."""
    found, steps = 0, {int(torch.tensor(step).abs().view(torch.int32)) for step in STEPS}
    for case in CASES:
        if case.op != "learned_linear" or "gumbel-B" not in case.what:
            continue
        for machine in machines(case, capability):
            if machine.kernel == "_drawn":
                found += 1
                contracted, kept = (
                    constants_of(machine.ptx, "fma"),
                    constants_of(machine.ptx, "mul|add|sub"),
                )
                assert bool(re.search(r"\bfma\.", machine.ptx)) == case.what.startswith(
                    "float32"
                ), case
                assert not steps & contracted and steps <= kept, case
                assert re.search(r"\bdiv\.rn\.f32\b", machine.ptx), case
                assert not re.search(r"\bdiv\.(?:full|approx)", machine.ptx), case
    assert found >= 5


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_64_bit_offsets_compile(op: str) -> None:
    case = next(c for c in CASES if c.op == op)
    for each in aot.launches_of(case):
        machine = aot.compiled(aot.widened(each), 90)
        assert machine.spills == 0 and machine.stack == 0, machine


def test_more_masks_and_rows_than_a_second_axis_takes() -> None:
    """65,535 programs: axes other than the first have no more."""
    bits = torch.zeros(70_000, 8, dtype=torch.uint8)
    x, w, groups = torch.zeros(70_000, 8), torch.zeros(8, 8), torch.arange(70_000)
    for op, launcher, arguments in (
        ("unpack", "unpack", (bits, 64)),
        ("popcount", "popcount", (bits,)),
        ("masked_linear", "masked_linear", (x, w, bits, None, None)),
        ("masked_linear", "masked_linear", (x.repeat(8, 1), w, bits, None, None)),
        ("masked_linear", "grad_input", (x, w, bits, groups)),
    ):
        launches = aot.launches_of(Case(op, "many", launcher, arguments))
        assert launches
        for each in launches:
            assert each.grid[0] >= 70_000 and max((0, *each.grid[1:])) <= 65_535, (
                launcher,
                each.grid,
            )


@triton.jit
def heavy(x_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    # All of x is needed again after its sum: 512 values a thread do not fit in 255 registers.
    for _ in range(4):
        x = x * tl.sum(x) + x
    tl.store(x_ptr + at, x)


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
def test_rates_on_the_device_compile(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors on the CPU here, which the launchers take for tensors on a device."""
    case = next(c for c in CASES if c.op == op)
    by_number = aot.launches_of(case)
    monkeypatch.setattr(launch, "number", lambda scalar: scalar.reshape(()))
    for with_numbers, found in zip(by_number, aot.launches_of(case), strict=True):
        assert found.arguments.keys() == with_numbers.arguments.keys()
        machine = aot.compiled(found, 90)
        assert machine.spills == 0 and machine.stack == 0, machine
        assert machine.ptx != aot.compiled(with_numbers, 90).ptx


def test_the_reader_would_notice() -> None:
    arguments = {"x_ptr": torch.zeros(16), "N": 16384}
    found = aot.compiled(
        aot.Launch(heavy, arguments, {"num_warps": 1, "enable_fp_fusion": True}), 80
    )
    assert found.spills > 0
    assert re.search(r"\bfma\.", found.ptx)
