"""`fastmask data check`: what is wrong with a folder of images, before a long run finds out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmask.cli.failures import USAGE, reported
from fastmask.cli.progress import meter

if TYPE_CHECKING:
    from fastmask.data import Finding, Report

# Places named of each finding, and classes of which the table has a row each.
NAMED, ROWS = 10, 60

_EXAMPLES = """[bold]Examples[/bold]

fastmask data check PACS
[dim]· folders laid out as domain/class/image[/dim]

fastmask data check PACS --splits PACS/splits
[dim]· with published lists, which are checked against the folder[/dim]

fastmask data check PACS --json | jq -r '.findings[] | select(.kind == "damaged") | .places[].path'
[dim]· every damaged file, a line each[/dim]
"""


# One line a paragraph: the terminal breaks them.
_HELP = (
    "Check a folder of images: read every file, decode every picture, and name all faults at once.\n\n"
    "Errors are what a run would stop at: exit code 2. Warnings are what it would survive and you may "
    "not have meant: exit code 0."
)


def add_to(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(help="Look at data before they are used.", no_args_is_help=True)
    # With one command alone, typer would drop its name.
    group.callback()(lambda: None)
    group.command("check", help=_HELP, epilog=_EXAMPLES)(check)
    app.add_typer(group, name="data")


def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder laid out as domain/class/image.")
    ],
    splits: Annotated[
        Path | None,
        typer.Option("--splits", metavar="DIR", help="Folder of published split files."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every place, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print what `fastmask.data.check` finds."""
    with reported(debug):
        from fastmask import data

        with meter(Console(stderr=True), quiet or as_json) as progress:
            report = data.check(folder, splits, progress=progress)
        if as_json:
            typer.echo(json.dumps({"ok": not report.errors, **asdict(report)}, indent=2))
        else:
            _tell(Console(highlight=False), report)
        if report.errors:
            raise typer.Exit(USAGE)


def _tell(console: Console, report: Report) -> None:
    if report.counts:
        console.print(_table(report))
    for found in report.findings:
        console.print(_heading(found))
        # One line each, never folded: a path is copied whole.
        console.print(Text(f"  {found.advice}", style="italic"), soft_wrap=True)
        for place in found.places[:NAMED]:
            console.print(Text(f"    {_shown(str(place))}"), soft_wrap=True)
        if (more := len(found.places) - NAMED) > 0:
            console.print(Text(f"    and {more} more; --json names all", style="dim"))
        console.print()
    console.print(_verdict(report))


def _table(report: Report) -> Table:
    """Pictures that can be used: a row a class, a column a domain."""
    from rich.box import SIMPLE_HEAD

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("class", "all", no_wrap=True)
    for domain, counts in report.counts.items():
        table.add_column(
            Text(_shown(domain)), f"{sum(counts.values()):,}", justify="right", overflow="fold"
        )
    for name in report.classes[:ROWS]:
        cells = [counts.get(name) for counts in report.counts.values()]
        table.add_row(Text(_shown(name)), *(_cell(n) for n in cells))
    if len(report.classes) > ROWS:
        table.add_row(Text(f"and {len(report.classes) - ROWS} more", style="dim"))
    return table


def _cell(n: int | None) -> Text:
    return Text("none" if n is None else f"{n:,}", style="" if n else "bold red")


def _heading(found: Finding) -> Text:
    style = "bold red" if found.level == "error" else "bold yellow"
    return Text.assemble((f"{found.level}: ", style), f"{found.what} ({len(found.places):,})")


def _verdict(report: Report) -> Text:
    errors, warnings = len(report.errors), len(report.warnings)
    said = f"{_number(errors, 'error')}, {_number(warnings, 'warning')}"
    if errors:
        return Text(f"{said}: a run would stop at the errors", style="bold red")
    pictures = sum(sum(counts.values()) for counts in report.counts.values())
    return Text(
        f"{said}: {pictures:,} pictures of {len(report.classes)} classes in {len(report.counts)} "
        "domains can be used",
        style="bold green",
    )


def _number(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _shown(name: str) -> str:
    """A name as a terminal can show it: what is not printable as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
