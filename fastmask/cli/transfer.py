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
from fastmask.errors import FastmaskError, MissingPackage, RunFolderError, require

if TYPE_CHECKING:
    from fastmask.transfer import Config

# The field of transfer.Config that each option sets.
FIELDS = {
    "data": "data",
    "splits": "splits",
    "test_fraction": "test_fraction",
    "backbone": "backbone",
    "weights": "weights",
    "cache": "cache",
    "source": "sources",
    "target": "targets",
    "strategy": "strategies",
    "start": "starts",
    "seeds": "seeds",
    "seed": "seed",
    "vary": "vary",
    "density": "density",
    "beta": "beta",
    "tau": "tau",
    "samples": "samples",
    "editor_rule": "editor_rule",
    "hidden": "hidden",
    "layers": "layers",
    "policy": "bn_policy",
    "engine": "engine",
    "batch": "batch",
    "target_steps": "target_steps",
    "target_lr": "target_lr",
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

fastmask transfer --curves
[dim]· trade-off curves too: source kept against target paid, as each knob varies[/dim]

fastmask transfer --hidden 1024
[dim]· a classifier with a hidden layer, its last layer masked[/dim]

fastmask transfer --layers 12 --policy affine --seeds 1
[dim]· mask and fine-tune the small backbone's last convolution too, norms' scales learning with it[/dim]

fastmask transfer --config runs/first/config.json --tau 0.5 --json
[dim]· an earlier run's settings with one changed, and JSON for a program[/dim]

fastmask transfer --resume runs/digits-20260101-120000
[dim]· go on with a sweep that was interrupted[/dim]
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
    # The folder's own default is made up for each run.
    shown = {name: field for name, field in FIELDS.items() if name != "out"}
    kind = defaults.command(shown, _config)
    app.command("transfer", help=_HELP, epilog=_EXAMPLES, cls=kind)(transfer)


def transfer(
    data: opt.Data = None,
    splits: opt.Splits = None,
    test_fraction: opt.TestFraction = None,
    backbone: opt.Backbone = None,
    weights: opt.Weights = None,
    cache: opt.Cache = None,
    source: opt.Source = None,
    target: opt.Target = None,
    strategy: opt.Strategy = None,
    start: opt.Start = None,
    seeds: opt.Seeds = None,
    seed: opt.Seed = None,
    vary: opt.Vary = None,
    curves: opt.Curves = False,
    density: opt.Density = None,
    beta: opt.Beta = None,
    tau: opt.Tau = None,
    samples: opt.Samples = None,
    editor_rule: opt.EditorRule = None,
    hidden: opt.Hidden = None,
    layers: opt.Layers = None,
    policy: opt.Policy = None,
    engine: opt.Engine = None,
    batch: opt.Batch = None,
    target_steps: opt.TargetSteps = None,
    target_lr: opt.TargetLr = None,
    train_unmasked: opt.TrainUnmasked = False,
    exact_recall: opt.ExactRecall = False,
    device: opt.Device = None,
    settings: opt.Set = None,
    out: opt.Out = None,
    resume: opt.Resume = None,
    config: opt.From = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    no_report: opt.NoReport = False,
    debug: opt.Debug = False,
) -> None:
    """Run the domain-transfer study; `_HELP` is what its users read."""
    # A flag that is off, and a list that is empty, were not given.
    given = {
        FIELDS[name]: value
        for name, value in locals().items()
        if name in FIELDS and value is not None and value is not False and value != []
    }
    with reported(debug):
        if resume is not None:
            _check_alone(given, settings, config, curves)
            chosen = _resumed(resume)
        else:
            chosen = _configured(given, settings or [], config)
            chosen = _with_curves(chosen) if curves else chosen
        folder = Path(chosen.out).expanduser()
        if not no_report:
            _check_drawing()
        report = _run(chosen, folder, resume is not None, not no_report, quiet, debug)
        from fastmask.cli import summary

        if as_json:
            typer.echo(json.dumps(summary.as_json(folder, report), indent=2))
        elif quiet:
            typer.echo(report or folder)
        else:
            summary.tell(Console(), folder, report)


def _configured(given: dict[str, Any], settings: list[str], earlier: Path | None) -> Config:
    """The settings: those given, else those of an earlier run, else the library's."""
    fields: dict[str, Any] = _read_config(earlier) if earlier is not None else {}
    # The folder of the earlier run holds that run.
    fields.pop("out", None)
    fields |= dict(map(_setting, settings))
    for name in ("density", "cache"):
        if name in given:
            given[name] = _number_or_none(name, given[name])
    fields |= given
    kind = _config()
    fields.setdefault("out", _new_folder(str(fields.get("data", defaults.of(kind)["data"]))))
    try:
        return kind.from_json(fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _with_curves(config: Config) -> Config:
    """The same with every knob of its strategies varied that is not varied already."""
    from dataclasses import replace

    from fastmask.transfer import variations

    own = {name for name, _ in map(variations.parse, config.vary)}
    more = tuple(
        text
        for text in variations.CURVES
        if (name := variations.parse(text)[0]) not in own
        and any(name in variations.KNOBS[strategy] for strategy in config.strategies)
    )
    return replace(config, vary=(*config.vary, *more))


def _check_alone(
    given: dict[str, Any], settings: list[str] | None, config: Path | None, curves: bool
) -> None:
    """Raise unless --resume came without settings: a sweep goes on as it began."""
    others = [f"--{name.replace('_', '-')}" for name in given]
    others += ["--set"] * bool(settings) + ["--config"] * bool(config) + ["--curves"] * curves
    if others:
        raise ValueError(
            f"--resume: expected no other setting, got {', '.join(others)}: "
            "a sweep goes on with the settings it began with"
        )


def _resumed(folder: Path) -> Config:
    """The settings of the sweep in a run folder."""
    if not (folder / "config.json").is_file():
        raise RunFolderError(f"--resume {folder}: no folder of a sweep: it has no config.json")
    fields = _read_config(folder / "config.json") | {"out": str(folder)}
    try:
        return _config().from_json(fields)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"--resume {folder}: config.json cannot be used ({error})") from error


def _check_drawing() -> None:
    """Say that matplotlib is missing before the work, not after it."""
    try:
        require("matplotlib", extra="report")
    except MissingPackage as error:
        raise MissingPackage(f"{error}, or leave the report out with --no-report") from error


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _number_or_none(name: str, text: str) -> Any:
    """`none` is None; a density is a number, a cache a folder."""
    if text == "none":
        return None
    if name == "cache":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--{name}: expected a number or none, got {text!r}") from error


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


def _run(
    config: Config, folder: Path, resume: bool, draw: bool, quiet: bool, debug: bool
) -> Path | None:
    """Run the study and draw its report; where it stops early, say what is kept."""
    from fastmask.report import render
    from fastmask.transfer import run

    # The rows of an earlier run in the same folder are none of this run's.
    occupied = (folder / "results.csv").exists() and not resume
    try:
        with meter(Console(stderr=True), quiet) as progress:
            run(config, progress=progress, resume=resume)
            if draw:
                progress("drawing the report", 0, 1)
                report = render(folder)
                progress("drawing the report", 1, 1)
                return report
            return None
    except KeyboardInterrupt:
        kept = None if occupied else _kept(folder)
        say("interrupted", kept or "no run had finished yet", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        kept = None if occupied else _kept(folder)
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
        f"go on with: fastmask transfer --resume {shlex.quote(str(folder))}; "
        f"draw what there is with: fastmask report {shlex.quote(str(folder))}"
    )
