"""`import fastmask` needs torch, numpy and safetensors alone, and the reference path runs on them."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = (
    "triton", "torchvision", "timm", "sklearn", "matplotlib", "PIL", "transformers", "typer", "rich",
    "click", "scipy", "pandas", "pybind11", "ninja", "fastmask._cpu", "fastmask._cuda",
)  # fmt: skip

# torch comes first: its own start-up looks for triton.
PROGRAM = f"""
import sys
import torch
blocked = {BLOCKED!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in blocked):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
for name in [n for n in sys.modules if any(n == b or n.startswith(b + ".") for b in blocked)]:
    del sys.modules[name]
import fastmask
from fastmask import _backend, ops
assert "fastmask._cpu is not in this installation" in _backend.missing("cpu")
from fastmask.errors import MissingPackage, require
bits = ops.sample_mask(torch.zeros(37, 45), seed=1)
x = torch.randn(3, 45)
y = ops.masked_linear(x, torch.randn(37, 45), bits)
assert y.shape == (3, 37) and y.isfinite().all()
try:
    require("torchvision", extra="vision")
except MissingPackage as error:
    assert "pip install 'fastmask[vision]'" in str(error)
else:
    raise SystemExit("the block does not block")
print("ran")
"""


def test_import_and_reference_path_without_optional_packages() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0 and run.stdout.strip() == "ran", run.stderr
