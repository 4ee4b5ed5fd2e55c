"""All commands under one name; no command's own libraries are imported until it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from fastmask import __version__
from fastmask.cli import bench, data, info, report, transfer

app = typer.Typer(
    help="One-bit masks over the weights of a pretrained network.",
    epilog="Start with [bold]fastmask transfer[/bold]: it needs no data and no download.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Options before any command."""


transfer.add_to(app)
report.add_to(app)
data.add_to(app)
bench.add_to(app)
info.add_to(app)
