"""`fastmask bench`: time the ops on this machine beside what one would write without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from fastmask.cli.failures import FAILED, reported, say

WHAT, HOW, OUT = "What is timed", "How", "What comes out"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help=r"Ops, such as masked_linear or sample_mask. [dim]\[default: all][/dim]",
        ),
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            metavar="NAME,...",
            rich_help_panel=WHAT,
            help="Sets of shapes: default, all, those of a network (resnet18, resnet50, vit-b, vit-l, bert, "
            "llama2-7b, llama3-8b, llama-70b), heads, adversarial, a layer such as 4096x11008 or "
            "4096x11008x64 with its rows, or a number of elements, as the op has them.",
        ),
    ] = "default",
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            rich_help_panel=WHAT,
            help=r"float32, bfloat16 or float16; repeat for several. [dim]\[default: the op's own][/dim]",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            rich_help_panel=WHAT,
            help="cpu, triton, cuda or reference; repeat for several. "
            r"[dim]\[default: each compiled one][/dim]",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            rich_help_panel=WHAT,
            help=r"cpu, cuda, cuda:1, ... [dim]\[default: cuda where there is one][/dim]",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=HOW,
            help="Let torch.compile compete too; it takes a while for each case.",
        ),
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, rich_help_panel=HOW, help="Rounds of a case.")
    ] = 25,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, rich_help_panel=HOW, help="Threads on the CPU."),
    ] = None,
    malloc: Annotated[
        str,
        typer.Option(
            "--malloc",
            metavar="default|tuned",
            rich_help_panel=HOW,
            help="tuned starts this program again with an allocator that keeps large blocks (glibc): "
            "plain torch is much faster with it on the CPU.",
        ),
    ] = "default",
    listed: Annotated[
        bool, typer.Option("--list", rich_help_panel=OUT, help="Name the cases and stop.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", rich_help_panel=OUT, help="Append a row for each case."
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            rich_help_panel=OUT,
            help="Time nothing: draw the table (markdown) and the roofline (PNG, SVG) of such a file.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Time ops on this machine beside plain PyTorch: every result is checked before it is timed.

    A row is one case: its median time, what share of the floor that is (this
    machine's measured bandwidth or matrix product), and how many times longer
    the same takes with a float mask, with a bool mask, with the best of plain
    torch, and without any mask. Below 1 the other is faster.

    [dim]fastmask bench masked_linear --shapes 4096x11008x8[/dim]
    [dim]fastmask bench --csv mine.csv; fastmask bench --from mine.csv[/dim]
    """
    with reported(debug):
        if given is not None:
            for file in _program("figures").write(given, given.parent):
                typer.echo(file)
            return
        harness = _program("harness")
        if malloc not in ("default", "tuned"):
            raise ValueError(f"--malloc: expected default or tuned, got {malloc!r}")
        machine = _program("machine")
        if malloc == "tuned" and not machine.tuned():
            machine.restart_tuned()
        setup = _setup(harness, shapes, dtype, backend, device, compiled, rounds, threads)
        cases = [case for op in ops or harness.ops() for case in harness.cases(op, setup)]
        if listed:
            for case in cases:
                typer.echo(case)
            return
        outcome = harness.run(cases, setup, _said, table=table)
        _show(outcome.rows)
        if outcome.wrong:
            say("error", f"{len(outcome.wrong)} cases are wrong and were not timed")
            raise typer.Exit(FAILED)


def _program(name: str) -> ModuleType:
    """One of the benchmark programs, which a wheel carries and a checkout has beside the package."""
    try:
        return importlib.import_module(f"fastmask._benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fastmask._benchmarks.{name}":
            raise
        raise OSError(
            "the benchmark programs are not in this installation; a wheel and a checkout have them"
        ) from None


def _setup(
    harness: Any,
    shapes: str,
    dtype: list[str] | None,
    backend: list[str] | None,
    device: str | None,
    compiled: bool,
    rounds: int,
    threads: int | None,
) -> Any:
    import torch

    from fastmask import _backend

    for name in dtype or ():
        if name not in harness.DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(harness.DTYPES)}, got {name!r}")
    for name in backend or ():
        if name not in (*_backend.BACKENDS, "auto"):
            expected = ", ".join((*_backend.BACKENDS, "auto"))
            raise ValueError(f"--backend: expected one of {expected}, got {name!r}")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(chosen)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {chosen}: {str(error).splitlines()[0]}") from None
    if threads is not None:
        torch.set_num_threads(threads)
    return harness.Setup(
        device=found,
        shapes=tuple(shapes.split(",")),
        dtypes=tuple(harness.DTYPES[name] for name in dtype or ()),
        backends=tuple(backend or ()),
        compiled=compiled,
        rounds=rounds,
    )


def _said(sentence: str) -> None:
    """What a run says as it goes, on the error stream: a case takes a while."""
    typer.echo(sentence, err=True)


def _show(rows: list[dict[str, str]]) -> None:
    """A table for each op, back end and dtype."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    key = ("op", "backend", "dtype")
    for kind in dict.fromkeys(tuple(row[name] for name in key) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in key) == kind]
        ratios = [name for name in mine[0] if name[:2] == "x_" and any(row[name] for row in mine)]
        found = Table(
            title=Text(", ".join(kind), style="bold"), title_justify="left", box=SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        found.add_column("shape", overflow="fold")
        for heading in ("ms", "of floor", *(name[2:].replace("_", " ") for name in ratios)):
            found.add_column(heading, justify="right", min_width=5)
        for row in mine:
            density = "" if row["density"] == "0.5" else f" density {row['density']}"
            found.add_row(
                Text(row["shape"] + density),
                Text(f"{float(row['p50_ms']):.3g}", style="bold"),
                Text(f"{float(row['floor_share']):.0%}"),
                *(_ratio(row[name]) for name in ratios),
            )
        console.print(found)
    if rows:
        console.print("Under a rival's name: how many times longer it takes, in the same run.")


def _ratio(written: str) -> Any:
    from rich.text import Text

    if not written:
        return Text("")
    ratio = float(written)
    return Text(
        f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}",
        style="green" if ratio >= 1 else "yellow",
    )
