"""Tables, figures and the page of a run, drawn from its folder alone."""

from fastmask.report.mask_rows import MaskRow, read_mask_rows
from fastmask.report.metrics import (
    Spread,
    keeps_source_best,
    mean_source_gain,
    mean_target_change,
    paired_difference,
    source_gain,
    target_change,
)
from fastmask.report.render import render
from fastmask.report.rows import Row, read_rows
from fastmask.report.run_folder import RunFolder, read_run

__all__ = [
    "MaskRow",
    "Row",
    "RunFolder",
    "Spread",
    "keeps_source_best",
    "mean_source_gain",
    "mean_target_change",
    "paired_difference",
    "read_mask_rows",
    "read_rows",
    "read_run",
    "render",
    "source_gain",
    "target_change",
]
