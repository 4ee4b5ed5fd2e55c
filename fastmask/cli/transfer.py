"""`fastmask transfer`: the domain-transfer study on the embedded digits or on a folder of images."""

from __future__ import annotations

import json
import shlex
import traceback
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from fastmask.cli import defaults
from fastmask.cli import options as opt
from fastmask.cli.failures import FAILED, INTERRUPTED, reported, say
from fastmask.cli.progress import meter
from fastmask.errors import FastmaskError, RunFolderError, require

if TYPE_CHECKING:
    from fastmask.transfer import Config

# The field of transfer.Config that each option sets.
FIELDS = {
    "data": "data",
    "splits": "splits",
    "backbone": "backbone",
    "weights": "weights",
    "cache": "cache",
    "source": "sources",
    "target": "targets",
    "strategy": "strategies",
    "start": "starts",
    "seeds": "seeds",
    "seed": "seed",
    "tau": "tau",
    "samples": "samples",
    "beta": "beta",
    "density": "density",
    "hidden": "hidden",
    "train_unmasked": "train_unmasked",
    "exact_recall": "exact_recall",
    "device": "device",
    "out": "out",
}

_EXAMPLES = """[bold]Examples[/bold]

fastmask transfer
[dim]· the embedded digits: every pair of four domains, in minutes[/dim]

fastmask transfer --data PACS --backbone efficientnet_lite0
[dim]· your images, laid out as domain/class/image[/dim]

fastmask transfer --source photo --target sketch --strategy binary --seeds 1
[dim]· one pair, one strategy, one seed[/dim]

fastmask transfer --config runs/first/config.json --tau 0.5 --json
[dim]· an earlier run's settings with one changed, and JSON for a program[/dim]
"""

# One line a paragraph: the terminal breaks them.
_HELP = (
    "Fine-tune on a target domain without forgetting the source: learn, freeze, compare, report.\n\n"
    "For every pair of domains: train a classifier on the source; find the weights the source needs, "
    "by each strategy; freeze those and fine-tune the others on the target; test on both. Unmasked "
    "fine-tuning and training on the target alone are run beside it. Accuracies, masks, figures and "
    "one report.html end up in the run folder."
)


def _config() -> type[Config]:
    from fastmask.transfer import Config

    return Config


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    kind = defaults.command(FIELDS, _config)
    app.command("transfer", help=_HELP, epilog=_EXAMPLES, cls=kind)(transfer)


def transfer(
    data: opt.Data = None,
    splits: opt.Splits = None,
    backbone: opt.Backbone = None,
    weights: opt.Weights = None,
    cache: opt.Cache = None,
    source: opt.Source = None,
    target: opt.Target = None,
    strategy: opt.Strategy = None,
    start: opt.Start = None,
    seeds: opt.Seeds = None,
    seed: opt.Seed = None,
    tau: opt.Tau = None,
    samples: opt.Samples = None,
    beta: opt.Beta = None,
    density: opt.Density = None,
    hidden: opt.Hidden = None,
    train_unmasked: opt.TrainUnmasked = None,
    exact_recall: opt.ExactRecall = None,
    device: opt.Device = None,
    out: opt.Out = None,
    config: opt.From = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    no_report: opt.NoReport = False,
    debug: opt.Debug = False,
) -> None:
    """Run the domain-transfer study; `_HELP` is what its users read."""
    given = {name: value for name, value in locals().items() if name in FIELDS}
    with reported(debug):
        chosen = _configured({k: v for k, v in given.items() if v is not None}, config)
        folder = Path(chosen.out)
        if not no_report:
            # Said before the work, not after it.
            require("matplotlib", extra="report")
        _run(chosen, folder, quiet, debug)
        from fastmask.cli import summary
        from fastmask.report import render

        report = None if no_report else render(folder)
        if as_json:
            typer.echo(json.dumps(summary.as_json(folder, report), indent=2))
        elif quiet:
            typer.echo(report or folder)
        else:
            summary.tell(Console(), folder, report)


def _configured(given: dict[str, Any], earlier: Path | None) -> Config:
    """The settings: those given, else those of an earlier run, else the defaults."""
    kind = _config()
    fields = {
        FIELDS[name]: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
    }
    if earlier is not None:
        fields = {**_read_config(earlier), **fields}
    if "out" not in given:
        fields["out"] = _new_folder(fields.get("data", defaults.of(kind)["data"]))
    return kind(**fields)


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of an earlier run's config.json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"--config {path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"--config {path}: expected a JSON object")
    return value


def _new_folder(data: str) -> Path:
    """`runs/<data>-<date>-<time>`: sorted by time, and never an earlier run's."""
    name = Path(data).resolve().name if data != "digits" else data
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _run(config: Config, folder: Path, quiet: bool, debug: bool) -> None:
    """Run the study; where it stops early, say what is kept."""
    from fastmask.transfer import run

    try:
        with meter(Console(stderr=True), quiet) as progress:
            run(config, progress=progress)
    except KeyboardInterrupt:
        say("interrupted", _kept(folder) or "nothing was computed yet", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        kept = _kept(folder)
        if kept is None:
            raise
        if debug:
            traceback.print_exc()
        say("error", f"{type(error).__name__}: {error}")
        say("kept", kept, "bold yellow")
        raise typer.Exit(FAILED) from None


def _kept(folder: Path) -> str | None:
    """What an interrupted sweep leaves; None where no run had finished."""
    from fastmask.report import read_rows

    try:
        n = len(read_rows(folder / "results.csv"))
    except FastmaskError:
        return None
    if n == 0:
        return None
    return (
        f"{n} finished run{'s are' if n > 1 else ' is'} kept in {folder / 'results.csv'}; "
        f"draw what there is with: fastmask report {shlex.quote(str(folder))}"
    )
