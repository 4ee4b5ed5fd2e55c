"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)
    y = names["y"]
    assert isinstance(y, torch.Tensor)
    assert y.shape == (5, 10) and y.isfinite().all()


def test_the_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make {target}"


def test_the_files_it_names_are_there() -> None:
    for name in set(re.findall(r"`((?:docs|tests|fastmask)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), f"{name} is not there"
