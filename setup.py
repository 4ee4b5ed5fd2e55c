"""Builds the engines, fastmask._cpu and fastmask._cuda, with ninja; all else is declared in pyproject.toml.

No torch and no OpenMP: pybind11, a C++17 compiler and threads, and for the CUDA engine nvcc, whose runtime
is linked in, so that the module loads where there is no driver. CPU kernels are compiled once for each
instruction set, each with its own flags; CUDA kernels for each architecture of ARCHITECTURES that this nvcc
knows, or for those that FASTMASK_CUDA_ARCHS names (`90a` or `80,90a`; `none` builds no CUDA engine). Where a
compiler is missing or fails, the package is installed without that engine, and the reason is written beside
it for `fastmask info`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCES = HERE / "csrc" / "cpu"
CUDA_SOURCES = HERE / "csrc" / "cuda"

# No contraction: sampled bits and the optimizers' sums are specified operation by operation.
FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-psabi"
)
ISA_FLAGS = {"portable": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mpopcnt -mtune=haswell"
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mpopcnt "
        "-mprefer-vector-width=512 -mtune=skylake-avx512"
    )
    ISA_FLAGS["avx512bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16 -mavx512vbmi2 -mavx512vpopcntdq"
BOUND_ONCE = ("bindings", "pool", "rows")

# A cubin runs on later minor versions of its major one too. Code of the last is kept as PTX besides, which
# the driver translates for what comes after.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# The common denominator of what kernels take as parameters (32 KB) and of C++17.
OLDEST_NVCC = (12, 1)
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


def rules(compiler: str, target: Path) -> str:
    """The ninja file: one rule, one edge for each file and instruction set."""
    import pybind11

    x86 = "-DFASTMASK_X86" if "avx2" in ISA_FLAGS else ""
    include = (
        f"-I{shlex.quote(pybind11.get_include())} -I{shlex.quote(sysconfig.get_path('include'))}"
    )
    extra = os.environ.get("FASTMASK_CXXFLAGS", "")
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {compiler}",
        f"flags = {FLAGS} {x86} {extra}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} -pthread {extra} $in -o $out",
    ]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        once = source.stem in BOUND_ONCE
        for isa, flags in {"once": include}.items() if once else ISA_FLAGS.items():
            objects.append(f"{source.stem}.{isa}.o")
            more = flags if once else f"-DFASTMASK_ISA={isa} {flags}"
            lines += [f"build {objects[-1]}: compile {source}", f"  more = {more}"]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    return "\n".join(lines)


def nvcc() -> tuple[str | None, str]:
    """The path of nvcc, or None and why there is none to use."""
    named = os.environ.get("CUDACXX", "nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which(named) or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if found is None:
        return None, f"there is no CUDA compiler: {named} was not found"
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        wanted = ".".join(map(str, OLDEST_NVCC))
        return None, f"{found} is not of CUDA {wanted} or newer: {' '.join(said.split()[-4:])}"
    return found, ""


def architectures(compiler: str) -> tuple[list[str], str]:
    """What to compile for, and why there is nothing where it is empty."""
    known = subprocess.run(
        [compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    asked = os.environ.get("FASTMASK_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if asked == ["none"]:
        return [], "FASTMASK_CUDA_ARCHS is none"
    unknown = [arch for arch in asked if f"compute_{arch.rstrip('af')}" not in known]
    if unknown:
        return [], f"FASTMASK_CUDA_ARCHS: {compiler} does not know {', '.join(unknown)}"
    return asked or [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known], ""


def cuda_rules(compiler: str, archs: list[str], target: Path) -> str:
    """The ninja file of the CUDA engine: one edge for each file, all architectures in it."""
    import pybind11

    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    last = archs[-1].rstrip("af")
    codes.append(f"-gencode arch=compute_{last},code=compute_{last}")
    plain = [arch.rstrip("af") for arch in archs]
    capabilities = " ".join([*plain[:-1], f"{last}+"])
    include = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    host = f"-ccbin {shlex.quote(os.environ['CXX'])}" if os.environ.get("CXX") else ""
    lines = [
        f"nvcc = {compiler} {host}",
        f"flags = {CUDA_FLAGS} {' '.join(codes)} -DFASTMASK_CUDA_CAPABILITIES='\"{capabilities}\"'",
        "rule compile",
        "  command = $nvcc $flags $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $nvcc -shared -cudart static {' '.join(codes)} $in -o $out",
    ]
    objects = []
    for source in sorted([*CUDA_SOURCES.glob("*.cu"), CUDA_SOURCES / "bindings.cpp"]):
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {source}"]
        if source.suffix == ".cpp":
            lines += [f"  more = {include}"]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    return "\n".join(lines)


def tool(name: str) -> str:
    """The path of ninja, from its package or the system."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            raise FileNotFoundError(f"{name} is not installed") from None
        return found


class BuildEngine(build_ext):
    """Build the engines, or leave word why not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        engine = ext.name.rpartition(".")[2]
        where = Path(self.build_temp).absolute() / engine.strip("_")
        for folder in (target.parent, where):
            folder.mkdir(parents=True, exist_ok=True)
        # Read by fastmask/_backend.py. setuptools copies what lies in the build folder; an editable
        # install reads the source folder.
        said = f"{engine}_missing.txt"
        words = {target.parent / said}
        if self.editable_mode or self.inplace:
            words.add(HERE / "fastmask" / said)
        reason = (self.build_cpu if engine == "_cpu" else self.build_cuda)(target, where)
        for file in words:
            file.unlink(missing_ok=True)
            if reason is not None:
                file.write_text(reason + "\n", encoding="utf-8")
        if reason is not None:
            self.announce(f"{ext.name} was not built: {reason}", level=3)
            target.unlink(missing_ok=True)

    def build_cpu(self, target: Path, where: Path) -> str | None:
        """Build the CPU engine; return why there is none, or None."""
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            return f"there is no C++ compiler: {compiler} was not found"
        return self.run_ninja(where, lambda: rules(compiler, target))

    def build_cuda(self, target: Path, where: Path) -> str | None:
        """Build the CUDA engine; return why there is none, or None."""
        compiler, reason = nvcc()
        if compiler is None:
            return reason
        archs, reason = architectures(compiler)
        if not archs:
            return reason
        return self.run_ninja(where, lambda: cuda_rules(compiler, archs, target))

    def run_ninja(self, where: Path, write: Callable[[], str]) -> str | None:
        """Run ninja on a file; return what it said of a failure, or None."""
        try:
            (where / "build.ninja").write_text(write(), encoding="utf-8")
            done = subprocess.run(
                [tool("ninja")], cwd=where, capture_output=True, text=True, check=False
            )
        except (OSError, ImportError) as error:
            return f"the build could not start: {error}"
        if done.returncode == 0:
            return None
        sys.stderr.write(done.stdout + done.stderr)
        said = [line for line in done.stdout.splitlines() if "error" in line] or ["see its log"]
        return f"the build failed: {said[0].strip()}"


class ShipPrograms(build_py):
    """Copy the benchmark programs into the package, where a checkout finds them beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "fastmask" / "_benchmarks"
        self.mkpath(str(target))
        for file in (HERE / "benchmarks").glob("*.py"):
            if file.stem != "gpu_suite" and not file.stem.startswith("test_"):
                self.copy_file(str(file), str(target / file.name))


setup(
    ext_modules=[
        Extension("fastmask._cpu", sources=[], optional=True),
        Extension("fastmask._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": BuildEngine, "build_py": ShipPrograms},
)
