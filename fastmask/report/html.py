"""The report as one page: no script, nothing fetched, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from fastmask.report import metrics
from fastmask.report.canvas import Drawing
from fastmask.report.headline import headline
from fastmask.report.html_tables import strategies_html, table_1_html
from fastmask.report.noise import noise
from fastmask.report.page_style import CSS
from fastmask.report.paper import applies
from fastmask.report.rows import COLUMNS, Row
from fastmask.report.run_folder import RunFolder
from fastmask.report.tables import percent


def page(folder: RunFolder, drawings: Sequence[tuple[Drawing, str, str]]) -> str:
    """Compose the report; each drawing comes with its wide and its narrow SVG."""
    rows = folder.rows
    parts = [_head(folder), _findings(folder)]
    if table := table_1_html(rows):
        parts.append(_table_1(rows, table))
    if rows:
        before = percent(metrics.level(rows, lambda row: row.source_accuracy_before))
        parts.append(
            "<h2>All strategies</h2><p>Averaged over targets, then sources, then seeds. Before "
            f"fine-tuning, source accuracy was {before} %. “Frozen” is "
            "the share of masked weights that fine-tuning could not move; gains and changes are "
            "differences to unmasked fine-tuning with the same source, target and seed, as shares of 1."
            f"{_intervals(rows)}</p>" + strategies_html(rows) + _certainty(rows)
        )
    for drawing, wide, narrow in drawings:
        parts.append(
            f'<h2>{escape(drawing.title)}</h2><figure><div class="only-wide">{wide}</div>'
            f'<div class="narrow">{narrow}</div>'
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>{drawing.table}"
        )
    parts += [_made(folder), _runs(folder)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(folder))}</title><style>{CSS}</style></head><body>"
        + "\n".join(part for part in parts if part)
        + "</body></html>\n"
    )


def _title(folder: RunFolder) -> str:
    said = folder.environment.get("data") or folder.config.get("data") or ""
    data = str(said).rstrip("/").rsplit("/", 1)[-1]
    return f"Domain transfer on {data}" if data else "Domain transfer"


def _head(folder: RunFolder) -> str:
    rows = folder.rows
    seeds = len(metrics.seeds(rows))
    said = [
        _said(folder.config.get("backbone") or folder.environment.get("backbone") or ""),
        f"{len(metrics.sources(rows))} source domain{'s' if len(metrics.sources(rows)) != 1 else ''}",
        f"{seeds} seed{'s' if seeds != 1 else ''}",
        _progress(folder),
    ]
    return (
        f'<h1>{escape(_title(folder))}</h1><p class="sub">'
        + escape(" · ".join(word for word in said if word))
        + "</p>"
    )


def _progress(folder: RunFolder) -> str:
    planned = folder.planned
    done = len(folder.rows) + len(folder.varied)
    return f"{done} of {planned} runs" if planned else f"{done} runs"


def _findings(folder: RunFolder) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in headline(folder.rows))
    found = f'<div class="finding">{text}</div>'
    if folder.planned and len(folder.rows) + len(folder.varied) < folder.planned:
        found += (
            f'<div class="finding warn"><p>This sweep is incomplete: {_progress(folder)} have '
            "finished. Everything below is computed from those alone.</p></div>"
        )
    return found


def _table_1(rows: Sequence[Row], table: str) -> str:
    seeds = len(metrics.seeds(rows))
    over = (
        f"mean ±\u00a01 standard deviation over {seeds} seeds" if seeds > 1 else "one seed (n = 1)"
    )
    domains = {row.source for row in rows} | {row.target for row in rows}
    beside = (
        " The grey column repeats the values published in the paper (arXiv 2308.13957, Table 1): "
        "another network, other splits, one number each; they are no measurement of this run."
        if applies(domains)
        else ""
    )
    return (
        "<h2>Table 1: the binary mask, by where the free weights start</h2>"
        "<p>Source gain is how much more source accuracy is left than after unmasked fine-tuning; "
        "target change is how much more, or less, target accuracy is reached. Both are shares of 1, "
        f"averaged over targets; {over}; higher is better.{_intervals(rows)}{beside} "
        "Free weights start from the values before the source was learned (source-start, the "
        "default), from the source-trained values (source-end), or anew (random). The best start "
        "of each source is bold, however small its lead.</p>" + table
    )


def _intervals(rows: Sequence[Row]) -> str:
    if len(metrics.seeds(rows)) < 2:
        return ""
    return (
        " Below each stands its 95\u00a0% confidence interval over seeds; “noise” marks one that "
        "contains 0."
    )


def _certainty(rows: Sequence[Row]) -> str:
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in noise(rows))
    if len(metrics.seeds(rows)) < 2 or not said:
        return said
    return (
        f'{said}<p class="note">The intervals are Student’s t over seeds. Each seed counts once, with its '
        "mean over all pairs of domains: the pairs of a seed share masks and test pictures and are not "
        "independent. They say how far other seeds might move a mean, not what other pictures or domains "
        "would give; each stands for itself, and of twenty one may be wrong.</p>"
    )


def _made(folder: RunFolder) -> str:
    said = folder.environment.get("command")
    name = folder.path.resolve().name
    command = f"fastmask transfer --config {name}/config.json"
    # No domain named means every domain.
    settings = {
        key: "all" if key in ("sources", "targets") and not value else value
        for key, value in folder.config.items()
    }
    layers = folder.config.get("layers")
    learner = (
        "a head with the backbone’s chosen layers" if layers else "a classifier on frozen features"
    )
    given = f"<p>It was started with:</p><pre>{escape(str(said))}</pre>" if said else ""
    return (
        "<h2>How this was made</h2>"
        f"<p>Each source: train {learner}; find which of its weights to freeze, "
        "by each strategy; fine-tune the others on each target; test on both test splits. "
        "Accuracies are shares of test images never trained on.</p>"
        f"{given}<p>To run it again, where the folder {escape(name)} lies:</p><pre>{escape(command)}</pre>"
        f"<h3>Settings</h3>{_listing(settings)}"
        f"<h3>Environment</h3>{_listing(folder.environment)}"
    )


def _listing(values: dict[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(_said(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{items}</dl>" if items else '<p class="note">nothing recorded</p>'


def _said(value: Any) -> str:
    """A JSON value in words: lists with commas, objects as `name: value`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        parts = (
            f"{name} {_said(item)}"
            if not isinstance(item, (dict, list))
            else f"{name}: {_said(item)}"
            for name, item in value.items()
        )
        nested = any(isinstance(item, (dict, list)) for item in value.values())
        return ("; " if nested else ", ").join(parts) or "–"
    if isinstance(value, list):
        return ", ".join(_said(item) for item in value) or "–"
    return str(value)


def _runs(folder: RunFolder) -> str:
    rows, more = folder.rows, len(folder.varied)
    if not rows:
        return ""
    columns = COLUMNS[: COLUMNS.index("setting")]
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(f'{value:.4f}' if isinstance(value, float) else str(value))}</td>"
            for value in (getattr(row, name) for name in columns)
        )
        + "</tr>"
        for row in rows
    )
    varied = f'<p class="note">{more} more, with a knob varied, are in results.csv.</p>'
    return (
        f"<details><summary>All {len(rows)} runs{' at the sweep’s own settings' if more else ''}"
        f'</summary>{varied if more else ""}<div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
