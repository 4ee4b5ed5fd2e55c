"""What `fastmask transfer` says at the end: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastmask.report import Row, Spread, read_run
from fastmask.report.curves import curves
from fastmask.report.headline import headline
from fastmask.report.tables import strategy_table, table_1
from fastmask.report.terminal_tables import strategies_text, table_1_text


def tell(console: Console, out: Path, report: Path | None) -> None:
    """Print the finding, Table 1, the strategies, what it was run on, and where everything lies."""
    folder = read_run(out)
    rows = folder.rows
    for table in (table_1_text(rows), strategies_text(rows) if rows else None):
        if table is not None:
            console.print(table)
    for sentence in headline(rows):
        console.print(Text(sentence, style="bold"))
    console.print()
    for line in circumstances(folder.environment):
        console.print(Text(line, style="dim"))
    # One line each, never folded: a path is copied whole.
    console.print(f"run:    {out}", markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)


def circumstances(environment: Mapping[str, Any]) -> list[str]:
    """How many images each domain has, and what becomes of batch-norm statistics, as far as known."""
    said = []
    rows = environment.get("rows")
    if isinstance(rows, Mapping):
        counts = ", ".join(f"{name} {n['train']} + {n['test']}" for name, n in rows.items())
        classes = len(environment.get("classes", ()))
        said.append(f"images, training + test, of {classes} classes: {counts}")
    if "batch_norm" in environment:
        said.append(f"batch norm: {environment['batch_norm']}")
    return said


def as_json(out: Path, report: Path | None) -> dict[str, Any]:
    """The same for a program; accuracies and differences are shares of 1."""
    folder = read_run(out)
    rows: Sequence[Row] = folder.rows
    return {
        "run": str(out),
        "report": None if report is None else str(report),
        "runs": len(rows) + len(folder.varied),
        "planned_runs": folder.planned,
        "headline": [sentence.replace("\u00a0", " ") for sentence in headline(rows)],
        "table_1": [
            {
                "source": line.source or "mean",
                "start": line.start,
                "source_gain": _difference(line.gain),
                "target_change": _difference(line.change),
            }
            for group in table_1(rows)
            for line in group
        ],
        "strategies": [
            {
                "strategy": line.strategy,
                "start": line.start,
                "frozen_density": _plain(line.density),
                "source_accuracy_before": _plain(line.before),
                "source_accuracy": _plain(line.after),
                "target_accuracy": _plain(line.target),
                "source_gain": _difference(line.gain),
                "target_change": _difference(line.change),
            }
            for line in strategy_table(rows)
        ],
        "varied": [
            {
                "strategy": point.strategy,
                "setting": point.setting,
                "frozen_density": _plain(point.density),
                "source_gain": _difference(point.gain),
                "target_change": _difference(point.change),
            }
            for curve in curves(folder)
            for point in curve.points
        ],
    }


def _plain(value: Spread | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _difference(value: Spread | None) -> dict[str, Any] | None:
    """With its 95 % confidence interval over seeds, and whether that contains 0; None for one seed."""
    if value is None:
        return None
    return {
        **asdict(value),
        "ci95": None if value.ci95 is None else list(value.ci95),
        "within_noise": value.within_noise,
    }
