"""`fastmask report`: draw a run's figures and page again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmask.cli.failures import reported


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/digits-0.")
    ],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Draw a run's figures and report.html again from its folder alone.

    Reads results.csv, masks.csv, config.json, environment.json and masks/. Works on a sweep that was
    interrupted: the report says how many of its runs it shows.
    """
    with reported(debug):
        from fastmask.report import render

        typer.echo(render(run_dir))
