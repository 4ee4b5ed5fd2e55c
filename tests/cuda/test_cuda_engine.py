"""The CUDA engine as it was built: what it links, says with no driver, and what its kernels compiled to."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_machine as machine
import pytest
import torch

from fastmask import _backend, ops
from fastmask.errors import BackendUnavailable

ROOT = Path(__file__).parents[2]
MODULE = machine.module()
built = pytest.mark.skipif(MODULE is None, reason=str(_backend.missing("cuda")))
readable = pytest.mark.skipif(machine.cuobjdump() is None, reason="there is no cuobjdump")


def test_a_build_that_was_tried_succeeded() -> None:
    said = _backend.missing("cuda") or ""
    assert "failed" not in said and "could not start" not in said, said


@built
def test_it_links_no_cuda_library_and_no_torch() -> None:
    linked = subprocess.run(["ldd", str(MODULE)], capture_output=True, text=True, check=True)
    assert not re.search(r"cuda|torch|c10|python", linked.stdout.replace(str(MODULE), ""))


@built
def test_it_loads_where_there_is_no_torch_and_says_why_it_cannot_run() -> None:
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {str(MODULE)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.missing())\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-S", "-c", program], check=True, timeout=60,
                         capture_output=True, text=True, env=environment)  # fmt: skip
    assert re.search("CUDA", run.stdout), run.stdout


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_launch_with_no_device_is_a_sentence() -> None:
    from fastmask import _cuda

    bits, ones = torch.ones(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendUnavailable, match=r"popcount: .*CUDA.* \(CUDA error \d+\)"):
        _cuda.popcount(bits.data_ptr(), 1, 8, ones.data_ptr(), 0, 0)
    with pytest.raises(
        BackendUnavailable, match="back end 'cuda' cannot be used: torch sees no CUDA"
    ):
        ops.popcount(bits, backend="cuda")


def test_every_launcher_has_a_signature_with_the_names_of_its_declaration() -> None:
    text = (ROOT / "csrc" / "cuda" / "kernels.h").read_text().replace("\\\n", "")
    declared = {
        name: re.findall(r"(\w+)\s*(?:,|$)", arguments)
        for name, arguments in re.findall(r"X\((\w+), \(([^()]*)\)\)", text)
    }
    tree = ast.parse((ROOT / "fastmask" / "_cuda.pyi").read_text())
    typed = {
        n.name: [a.arg for a in n.args.args] for n in tree.body if isinstance(n, ast.FunctionDef)
    }
    assert declared and declared.items() <= typed.items()
    assert set(typed) - set(declared) == {"missing"}
    assert set(declared) - {"pack_bools", "pack_scores"} == {
        path.parent.name for path in (ROOT / "fastmask" / "ops").glob("*/cuda.py")
    } - {"pack"}


@built
@readable
def test_no_kernel_spills_on_any_architecture() -> None:
    found = machine.kernels()
    for kernel in found:
        # Spilled registers would lie on the stack.
        assert kernel.stack == 0 and kernel.local == 0, kernel
        assert 0 < kernel.registers <= 255 and kernel.shared <= 48 * 1024, kernel
    archs = {kernel.arch for kernel in found}
    assert len(found) == len(archs) * len({(k.op, k.name) for k in found})
    assert {k.op for k in found} == {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")} - {"device"}


@built
@readable
def test_the_table_of_the_documentation_is_of_these_kernels() -> None:
    """Compilers differ in the numbers, not in what is compiled."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    for kernel in machine.kernels():
        assert f"| `{kernel.op}` | `{kernel.name}` |" in text, kernel


@built
@readable
def test_every_kernel_over_a_weight_moves_16_bytes_at_a_time() -> None:
    """In the machine code of each: loads of 128 bits, and copies to shared memory that bypass registers."""
    arch = machine.kernels()[0].arch
    by_kernel = {
        machine.readable(mangled): code
        for mangled, code in re.findall(
            r"Function : (\w+)(.*?)(?=Function : |\Z)", machine.dump("-sass", "-arch", arch), re.S
        )
    }
    updated = ("masked_sgd_", "masked_adamw_", "restore_frozen_")
    for (op, name), code in by_kernel.items():
        if op in (*updated, "popcount") or (op == "masked_linear" and name.endswith("yes>")):
            assert re.search(r"LDG\.E\.[\w.]*128", code), (op, name)
        if op in updated:
            assert re.search(r"STG\.E\.[\w.]*128", code), (op, name)
        if name.startswith("multiply"):
            assert re.search(r"LDGSTS\.[\w.]*128", code), (op, name)


def setup_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_without_nvcc_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = setup_file(monkeypatch)
    for name in ("CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup["nvcc"]() == (None, "there is no CUDA compiler: nvcc was not found")
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    compiler, reason = setup["nvcc"]()
    assert compiler is None and re.search(r"is not of CUDA 12\.1 or newer: .*V11\.8\.89", reason)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_architectures_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_file(monkeypatch)
    monkeypatch.delenv("FASTMASK_CUDA_ARCHS", raising=False)
    everything, _ = setup["architectures"]("nvcc")
    assert everything[:4] == ["80", "86", "89", "90a"]
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "80,90a")
    assert setup["architectures"]("nvcc") == (["80", "90a"], "")
    rules = setup["cuda_rules"]("nvcc", ["80", "90a"], Path("x"))
    codes = "code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"
    assert "-gencode arch=compute_80," + " -gencode ".join(codes) in rules
    assert "80 90+" in rules
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "none")
    assert setup["architectures"]("nvcc") == ([], "FASTMASK_CUDA_ARCHS is none")
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "80 17")
    archs, reason = setup["architectures"]("nvcc")
    assert archs == [] and "does not know 17" in reason
