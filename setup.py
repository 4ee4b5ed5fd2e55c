"""Builds the CPU engine, fastmask._cpu, with ninja; everything else is declared in pyproject.toml.

No torch and no OpenMP: pybind11, a C++17 compiler and threads. Kernels are compiled once for each
instruction set, each with its own flags. Where there is no compiler the package is installed without the
engine, and the reason is written beside it for `fastmask info`.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCES = HERE / "csrc" / "cpu"
# Where a build that failed says why; read by fastmask/_backend.py.
REASON = "_cpu_missing.txt"

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
    ISA_FLAGS["avx512bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16"
BOUND_ONCE = ("bindings", "pool")


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
    """Build the engine, or leave word why not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        where = Path(self.build_temp).absolute() / "cpu"
        for folder in (target.parent, where):
            folder.mkdir(parents=True, exist_ok=True)
        # setuptools copies what lies in the build folder; an editable install reads the source folder.
        words = (
            {target.parent / REASON, HERE / "fastmask" / REASON}
            if self.editable_mode
            else {target.parent / REASON}
        )
        reason = self.build_engine(target, where)
        for file in words:
            file.unlink(missing_ok=True)
            if reason is not None:
                file.write_text(reason + "\n", encoding="utf-8")
        if reason is not None:
            self.announce(f"fastmask._cpu was not built: {reason}", level=3)
            target.unlink(missing_ok=True)

    def build_engine(self, target: Path, where: Path) -> str | None:
        """Run ninja; return why there is no engine, or None."""
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            return f"there is no C++ compiler: {compiler} was not found"
        try:
            (where / "build.ninja").write_text(rules(compiler, target), encoding="utf-8")
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
            if not file.stem.startswith("test_"):
                self.copy_file(str(file), str(target / file.name))


setup(
    ext_modules=[Extension("fastmask._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildEngine, "build_py": ShipPrograms},
)
