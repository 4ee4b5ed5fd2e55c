"""The compiled engine itself: what it links, its names, threads, forks, many seeds of sampled bits."""

from __future__ import annotations

import ast
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmask import _backend, ops
from fastmask.testing import as_integers, mask, values

if _backend.missing("cpu") is not None:
    pytest.skip(f"no CPU engine: {_backend.missing('cpu')}", allow_module_level=True)

from fastmask import _cpu

ROOT = Path(__file__).parents[2]


def test_it_links_neither_torch_nor_an_openmp_runtime() -> None:
    if sys.platform != "linux":
        pytest.skip("ldd is Linux's")
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True)
    names = re.sub(r"\(0x[0-9a-f]+\)", "", linked.stdout)
    assert not re.search(r"torch|c10|omp|mkl|python", names), names


def test_it_loads_where_there_is_no_torch() -> None:
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cpu', {_cpu.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import array\n"
        "mask, bits = array.array('B', [1, 0, 1]), array.array('B', bytes(8))\n"
        "module.pack_bools(mask.buffer_info()[0], 3, bits.buffer_info()[0], 1)\n"
        "assert bits[0] == 5 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-S", "-c", program], check=True, timeout=60)


def test_every_kernel_has_a_signature_with_the_names_of_its_declaration() -> None:
    text = (ROOT / "csrc" / "cpu" / "kernels.h").read_text()
    declared = {
        name: re.findall(r"(\w+)\s*(?:,|$)", arguments)
        for name, arguments in re.findall(r"X\((\w+), \(([^()]*)\)\)", text.replace("\\\n", ""))
        if name != "kernel"
    }
    tree = ast.parse((ROOT / "fastmask" / "_cpu.pyi").read_text())
    typed = {
        n.name: [a.arg for a in n.args.args] for n in tree.body if isinstance(n, ast.FunctionDef)
    }
    assert declared and declared.items() <= typed.items()
    lists = (ROOT / "csrc" / "cpu" / "rows.h").read_text()
    of_lists = set(re.findall(r"^(?:void|py::object) (\w+)\(", lists, re.MULTILINE))
    assert of_lists == {"know", "rows", "advance"}
    others = {"isa", "isas", "use", "borrow", "all_ones", *of_lists}
    assert set(typed) - set(declared) == others
    assert all(hasattr(_cpu, name) for name in typed)


@pytest.mark.parametrize("isa", _cpu.isas())
def test_a_million_elements_and_a_hundred_seeds_have_the_bits_of_the_reference(isa: str) -> None:
    before = _cpu.isa()
    try:
        _cpu.use(isa)
        logits = values(1_000_003) * 8
        for seed, n in ((2**64 - 1, 1_000_003), *((17 * i, 1000 + i) for i in range(100))):
            some = logits[:n]
            got = ops.sample_mask(some, seed=seed, samples=1 + seed % 2, stream=7, backend="cpu")
            want = ops.sample_mask(
                some, seed=seed, samples=1 + seed % 2, stream=7, backend="reference"
            )
            assert torch.equal(got, want), f"seed {seed}"
    finally:
        _cpu.use(before)


@pytest.mark.parametrize("isa", _cpu.isas())
def test_the_threshold_is_the_reference_where_it_turns(isa: str) -> None:
    logits = torch.tensor([0.0, -0.0, 40.0, -40.0, 41.0, -41.0, 88.0, -1e38, 1e38, 1e-40, -1e-40])
    logits = torch.cat([logits, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    logits = torch.cat([logits, torch.linspace(-45, 45, 20_000)])
    before = _cpu.isa()
    try:
        _cpu.use(isa)
        for seed in range(3):
            got = ops.sample_mask(logits, seed=seed, backend="cpu")
            assert torch.equal(got, ops.sample_mask(logits, seed=seed, backend="reference"))
    finally:
        _cpu.use(before)


def test_threads_do_not_change_a_bit_and_may_call_at_once() -> None:
    logits, before = values(300_001), torch.get_num_threads()
    want = ops.sample_mask(logits, seed=9, samples=3, backend="reference")
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(ops.sample_mask(logits, seed=9, samples=3, backend="cpu"), want):
                wrong.append(1)

    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(ops.sample_mask(logits, seed=9, samples=3, backend="cpu"), want)
        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_have_the_same_bits_on_every_instruction_set_and_number_of_threads(
    dtype: torch.dtype,
) -> None:
    n, isa, threads = 100_003, _cpu.isa(), torch.get_num_threads()
    frozen, grad, found = [ops.pack(mask(n))], values(n, seed=1, dtype=dtype), []
    try:
        for name, count in itertools.product(_cpu.isas(), (1, 3)):
            _cpu.use(name)
            torch.set_num_threads(count)
            adam, sgd = ([values(n, dtype=dtype), *torch.zeros(3, n, dtype=dtype)] for _ in "ab")
            for _ in range(3):
                lists = [[tensor] for tensor in (adam[0], grad, *adam[1:])]
                ops.masked_adamw_(*lists, [torch.tensor(2.0)], frozen, lr=0.01, backend="cpu")
                ops.masked_sgd_([sgd[0]], [grad], [sgd[1]], frozen, lr=0.1, momentum=0.9,
                                weight_decay=0.1, nesterov=True, backend="cpu")  # fmt: skip
            found.append([as_integers(tensor) for tensor in (*adam, *sgd)])
    finally:
        _cpu.use(isa)
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    _backend._openmp() is None, reason="torch's OpenMP runtime has no GOMP_parallel"
)
def test_it_runs_on_the_threads_that_torch_has() -> None:
    program = """
import os, torch
from fastmask import _cpu, ops
torch.set_num_threads(3)
torch.ones(10_000_000).mul_(2)
before = len(os.listdir("/proc/self/task"))
ops.sample_mask(torch.zeros(1_000_000), seed=1, backend="cpu")
assert len(os.listdir("/proc/self/task")) == before > 2
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    # In a process of its own: forking the one that runs the tests would copy all its threads' locks.
    program = """
import os, sys, torch
from fastmask import ops
torch.set_num_threads(3)
logits = torch.linspace(-4, 4, 500_000)
# Compared as bytes: torch's own threads do not survive a fork.
drawn = lambda: ops.sample_mask(logits, seed=1, backend="cpu").numpy().tobytes()
want = drawn()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if drawn() == want else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert drawn() == want
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_data_loader_worker_may_mask() -> None:
    class Masks(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> torch.Tensor:
            return ops.sample_mask(torch.zeros(10_000), seed=i, backend="cpu")

    data = Masks()
    loaded = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    assert all(torch.equal(loaded[i], data[i]) for i in range(6))


def test_bits_may_lie_at_any_address() -> None:
    bits = torch.zeros(8 * 5 + 1, dtype=torch.uint8)[1:]
    bits.copy_(ops.pack(mask(5 * 64)))
    assert bits.data_ptr() % 8
    assert torch.equal(ops.unpack(bits, (320,), backend="cpu"), mask(5 * 64))
    assert ops.popcount(bits, backend="cpu") == mask(5 * 64).sum()


def misleading(n: int) -> Tensor:
    """Scores whose evenly spaced sample is nothing like them."""
    scores = values(n)
    scores[(torch.arange(2**16, dtype=torch.float64) * (n / 2**16)).long()] = 9.0
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_scores_of_every_kind_have_the_same_largest(dtype: torch.dtype) -> None:
    n, inf = 2**20 + 77, math.inf
    plain = values(n)
    holes = torch.where(values(n, seed=1) > 1, math.nan, plain)
    ends = torch.where(values(n, seed=2) > 1, inf, torch.where(plain > 1, -inf, plain))
    steps = (plain * 2).round() / 2
    before = _cpu.isa()
    for scores in (plain, plain.sort().values, steps, torch.zeros(n), holes, ends, misleading(n)):
        for density in (3 / n, 0.5, 1 - 3 / n):
            want = ops.topk_mask(scores.to(dtype), density, backend="reference")
            for isa in _cpu.isas():
                _cpu.use(isa)
                got = ops.topk_mask(scores.to(dtype), density, backend="cpu")
                _cpu.use(before)
                assert torch.equal(got, want), (isa, density)
