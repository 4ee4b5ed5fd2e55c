"""`fastmask info` answers whatever is missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastmask import _backend
from fastmask.cli import info
from fastmask.cli.app import app

runner = CliRunner()


def test_says_versions_devices_and_back_ends() -> None:
    result = runner.invoke(app, ["info"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for word in ("torch", "reference", "available", "threads", *_backend.BACKENDS):
        assert word in result.output


def test_json_is_json_and_nothing_else() -> None:
    result = runner.invoke(app, ["info", "--json"])
    found = json.loads(result.stdout)
    assert found["backends"]["reference"] == {"available": True, "reason": None}
    assert set(found["backends"]) == set(_backend.BACKENDS)
    for value in found["backends"].values():
        assert value["available"] is (value["reason"] is None)
    assert found["devices"]["cpu"]["cores"] >= 1
    assert found["packages"]["torch"]["problem"] is None


def test_a_package_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", (("no-such-package", "nosuch", "vision"),))
    found = info.gather()["packages"]["no-such-package"]
    assert found["version"] is None
    assert found["problem"] == "not installed: pip install 'fastmask[vision]'"
    assert "pip install" in runner.invoke(app, ["info"], env={"COLUMNS": "120"}).output


def test_a_probe_that_raises_becomes_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("driver on fire")

    monkeypatch.setattr(_backend, "missing", broken)
    monkeypatch.setattr("torch.get_num_threads", broken)
    monkeypatch.setattr("torch.cuda.is_available", broken)
    monkeypatch.setattr("platform.platform", broken)
    result = runner.invoke(app, ["info"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "driver on fire" in result.output


def test_gpus_are_listed_with_memory_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Some GPU", 24 * 2**30, 9, 0

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: Properties)
    assert info._devices()["cuda:0"] == {
        "name": "Some GPU",
        "memory_gib": 24.0,
        "capability": "9.0",
    }


# A fresh interpreter in which these packages raise when imported, as a broken installation does.
PROGRAM = """
import sys
blocked = {blocked!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise {error}
sys.meta_path.insert(0, Block())
sys.argv = ["fastmask", "info"] + {arguments!r}
from fastmask.cli import main
main()
"""


@pytest.mark.parametrize(
    "blocked, error",
    [
        (["torch"], "ImportError('libtorch.so: undefined symbol')"),
        (["torch"], "OSError('libcudart.so.13: cannot open shared object file')"),
        (["torch", "numpy", "safetensors", "triton"], "ImportError('gone')"),
        (["torchvision", "timm", "sklearn", "PIL", "matplotlib"], "RuntimeError('no nms')"),
    ],
)
def test_broken_installations_are_described(blocked: list[str], error: str) -> None:
    program = PROGRAM.format(blocked=blocked, error=error, arguments=["--json"])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    said = error.split("'")[1]
    name = {"torchvision": "torchvision"}.get(blocked[0], blocked[0])
    assert said in found["packages"][name]["problem"]
    if "torch" in blocked:
        assert said in found["backends"]["reference"]["reason"]
        assert said in found["devices"]["cpu"]["problem"]
    else:
        assert found["backends"]["reference"]["available"]


def test_help_starts_without_torch() -> None:
    program = (
        "import sys; sys.argv = ['fastmask', '--help']\n"
        "from fastmask.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'matplotlib', 'timm'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert "HEAVY []" in run.stdout, run.stdout + run.stderr
    for command in ("transfer", "report", "info"):
        assert command in run.stdout
