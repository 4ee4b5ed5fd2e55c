"""All figures of a report, with the words that teach how to read each."""

from __future__ import annotations

from fastmask.report import metrics
from fastmask.report.bars import source_bars, target_bars
from fastmask.report.canvas import Drawing
from fastmask.report.mask_file import MaskFile
from fastmask.report.pictures import MOST_TILES, mask_pictures, weight_histograms
from fastmask.report.rows import MASKED
from fastmask.report.run_folder import RunFolder
from fastmask.report.tradeoff import tradeoff


def drawings(folder: RunFolder) -> list[Drawing]:
    """List the figures that the rows and masks of a run allow, in reading order.

    Raises:
        MaskFileError: a mask that results.csv reports is missing or damaged.
    """
    found: list[Drawing] = []
    rows = folder.rows
    masked = [name for name in metrics.strategies(rows) if name in MASKED]
    if rows:
        found.append(_source(folder))
        found.append(_target(folder))
    if any(metrics.source_gain(rows, name) for name in masked):
        found.append(_tradeoff(folder))
    learned = [m for s in metrics.sources(rows) if (m := folder.mask(s, "binary")) is not None]
    if learned:
        found.append(_masks(learned))
    trained = [m for s in metrics.sources(rows) if (m := folder.any_mask(s)) is not None]
    if trained:
        found.append(_weights(trained))
    return found


def _source(folder: RunFolder) -> Drawing:
    rows = folder.rows
    return Drawing(
        "figure5_source_accuracy",
        "Source accuracy after fine-tuning on each target",
        "Each panel is a source domain: a classifier learned it, was then fine-tuned on a target "
        "(a group of bars), and is tested here on the source again. The dashed line is its accuracy "
        "on the source before fine-tuning; the gap down to a bar is what was forgotten. Higher is "
        "better. Figure 5 of the paper.",
        "Grouped bars of source accuracy in percent per source, target and strategy.",
        lambda narrow: source_bars(rows, narrow),
    )


def _target(folder: RunFolder) -> Drawing:
    rows = folder.rows
    alone = (
        " “Target alone” never saw the source: it started from the initial values."
        if "scratch" in metrics.strategies(rows)
        else ""
    )
    return Drawing(
        "figure6_target_accuracy",
        "Target accuracy after fine-tuning",
        "The same runs, tested on the target they were fine-tuned on. Unmasked fine-tuning may move "
        "every weight and is what a mask is measured against; a bar a little lower is the price of "
        f"the entries kept frozen.{alone} Figure 6 of the paper.",
        "Grouped bars of target accuracy in percent per source, target and strategy.",
        lambda narrow: target_bars(rows, narrow),
    )


def _tradeoff(folder: RunFolder) -> Drawing:
    rows = folder.rows
    several = len(metrics.sources(rows)) > 1
    spread = ", with ± 1 standard deviation over seeds" if len(metrics.seeds(rows)) > 1 else ""
    marks = (
        f"Small marks are sources, averaged over targets and seeds; stars are their means{spread}."
        if several
        else f"Each star is the mean over targets{spread}."
    )
    return Drawing(
        "tradeoff",
        "What is kept and what it costs",
        "Both axes are differences to unmasked fine-tuning with the same source, target and seed. "
        "Up: more of the source is kept. Left: less of the target is learned. A strategy that cost "
        f"nothing would stand on the vertical line, as high as it can. {marks}",
        "Scatter of source gain against target change for each strategy and source.",
        lambda narrow: tradeoff(rows, narrow),
    )


def _masks(masks: list[MaskFile]) -> Drawing:
    name, seed = masks[0].last, masks[0].seed
    classes = masks[0].shapes[name][0]
    cut = (
        f" Only the first {MOST_TILES} of {classes} classes are shown."
        if classes > MOST_TILES
        else ""
    )
    return Drawing(
        "figure7_masks",
        "The binary masks",
        f"One tile is one class's row of the masked matrix “{name}” (seed {seed}), folded line by "
        "line; a dot is one weight. Yellow weights are frozen at their source-trained values, purple "
        "ones were fine-tuned on the target; the number is the share frozen. The order of features has no "
        f"meaning: look at how much is yellow, and at how classes differ.{cut} Figure 7 of the paper.",
        "Binary masks as pictures: frozen entries yellow, free entries purple.",
        lambda narrow: mask_pictures(masks, narrow),
    )


def _weights(masks: list[MaskFile]) -> Drawing:
    name, seed = masks[0].last, masks[0].seed
    others = len(masks[0].shapes) - 1
    more = f" {others} more masked parameters lie in the mask files." if others else ""
    return Drawing(
        "figure4_weights",
        "Trained weights and the naive rule",
        f"Values of “{name}” after training on each source (seed {seed}). The naive mask freezes what "
        "lies more than one standard deviation σ from the mean µ; on a normal distribution that is "
        f"31.7\u00a0% of the weights.{more} Figure 4 of the paper.",
        "Histogram of the trained weights of each source with mean and standard deviation.",
        lambda narrow: weight_histograms(masks, narrow),
    )
