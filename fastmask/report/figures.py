"""All figures of a report, with the words that teach how to read each."""

from __future__ import annotations

import math

from fastmask.report import metrics
from fastmask.report.alone import mask_alone, mask_alone_html
from fastmask.report.bars import source_bars, target_bars
from fastmask.report.canvas import Drawing
from fastmask.report.curve_figures import knob_lines, tradeoff_curves
from fastmask.report.curves import Curve, Point, curves, of_masks, own_points, own_value
from fastmask.report.html_tables import curves_html
from fastmask.report.mask_file import MaskFile
from fastmask.report.mask_rows import MaskRow
from fastmask.report.metrics import Spread
from fastmask.report.overlap import Overlaps, overlap_maps, overlaps
from fastmask.report.palette import strategy_label
from fastmask.report.paper import PACS, applies
from fastmask.report.pictures import MOST_TILES, mask_pictures, weight_histograms
from fastmask.report.rows import MASKED
from fastmask.report.run_folder import RunFolder
from fastmask.report.tradeoff import tradeoff


def drawings(folder: RunFolder) -> list[Drawing]:
    """List the figures that the rows and masks of a run allow, in reading order.

    Raises:
        MaskFileError: a mask that results.csv reports is missing or damaged.
    """
    drawn: list[Drawing] = []
    rows = folder.rows
    masked = [name for name in metrics.strategies(rows) if name in MASKED]
    if rows:
        drawn.append(_source(folder))
        drawn.append(_target(folder))
    if any(metrics.source_gain(rows, name) for name in masked):
        drawn.append(_tradeoff(folder))
    found = curves(folder)
    if found:
        drawn.append(_curves(folder, found))
    for knob in ("beta", "tau"):
        if mine := [curve for curve in found if curve.knob == knob]:
            drawn.append(_knob(folder, mine))
    learned = [m for s in metrics.sources(rows) if (m := folder.mask(s, "binary")) is not None]
    if learned:
        drawn.append(_masks(learned))
    if agreed := [each for each in overlaps(folder.masks) if each.cells]:
        drawn.append(_overlap(agreed))
    if own := [row for row in folder.mask_rows if not row.setting]:
        drawn.append(_alone(folder, own))
    trained = [m for s in metrics.sources(rows) if (m := folder.any_mask(s)) is not None]
    if trained:
        drawn.append(_weights(folder, trained))
    return drawn


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


def _curves(folder: RunFolder, found: list[Curve]) -> Drawing:
    own = own_points(folder)
    domains = {row.source for row in folder.rows} | {row.target for row in folder.rows}
    # The published means are over four sources: beside fewer they would compare unlike things.
    published = applies(domains) and len(metrics.sources(folder.rows)) == len(PACS)
    beside = (
        " Hollow marks are the means of the paper’s Table 1, its binary mask from three starts: another "
        "network and other splits, no measurement of this run."
        if published
        else ""
    )
    several = len({curve.strategy for curve in found}) > 1
    each = (
        " Panels of one strategy have a scale of their own; the others are grey there."
        if several
        else ""
    )
    return Drawing(
        "tradeoff_curves",
        "The trade-off as knobs vary",
        "Each line is a strategy with one of its knobs varied and all else as in the sweep, from its "
        "default start; the numbers are the knob’s values, where there is room. Both axes are means "
        "over targets, sources and seeds of differences to unmasked fine-tuning: up, more of the "
        "source is kept; left, less of the target is learned. Of two lines the upper right one is the "
        "better bargain. With beta varied the mask freezes what has a logit above 0, whatever share "
        f"that is. Stars are the sweep’s own settings.{each}{beside}",
        "Lines of source gain against target change, one a strategy and knob.",
        lambda narrow: tradeoff_curves(found, own, published, narrow),
        curves_html(found, own),
    )


def _knob(folder: RunFolder, found: list[Curve]) -> Drawing:
    knob = found[0].knob
    shares = {
        (point.strategy, point.setting): share
        for curve in found
        for point in curve.points
        if (share := _positive(folder, point)) is not None
        # Where a mask freezes what has a logit above 0 the two shares are one line, not two.
        and abs(share.mean - point.density.mean) > 1e-6
    }
    own = own_value(folder, knob)
    several = len(metrics.seeds(folder.varied)) > 1
    whiskers = " Whiskers: ± 1 standard deviation over seeds." if several else ""
    if knob == "beta":
        title = "Density against beta"
        said = (
            "Beta pushes every logit down; a weight stays where losing it would cost the source more. "
            "Left: the share of weights that end with a logit above 0 and are frozen. Right: what that "
            "does to source and target."
        )
    else:
        title = "The temperature tau"
        said = (
            "Tau is the temperature of the relaxed bits while the mask is learned. Left: the share "
            "frozen, and the share of logits above 0. Right: what the masks do to source and target."
        )
    return Drawing(
        f"knob_{knob}",
        title,
        f"{said} All are means over targets and sources, against unmasked fine-tuning.{whiskers}",
        f"Two panels against {knob} on a log axis: shares of the weights; source gain and target change.",
        lambda narrow: knob_lines(found, shares, own, narrow),
    )


def _positive(folder: RunFolder, point: Point) -> Spread | None:
    return of_masks(folder.mask_rows, point.strategy, point.setting, lambda row: row.positive_share)


def _overlap(found: list[Overlaps]) -> Drawing:
    said = []
    for each in found:
        words = []
        if (between := each.mean(same=False)) is not None:
            words.append(f"{between.overlap:.2f} between domains (chance {between.chance:.2f})")
        if (again := each.mean(same=True)) is not None:
            words.append(f"{again.overlap:.2f} from seed to seed (chance {again.chance:.2f})")
        said.append(f"{strategy_label(each.strategy)}: {', '.join(words)}")
    return Drawing(
        "mask_overlap",
        "Do two domains freeze the same weights?",
        "Overlap of the frozen entries of two sources, |A and B| / |A or B|, the mean over seeds; the "
        "smaller number is what independent masks of densities p and q would share, pq / (p + q − pq). "
        "Colour tells how far a pair lies between the two: 0 as chance would have it, 100 % the same "
        "mask. On the framed diagonal stands one domain’s mask against its own from another seed: how "
        f"far the method finds the same mask again. Means: {'; '.join(said)}.",
        "Heat maps of the overlap of frozen entries between source domains, one a strategy.",
        lambda narrow: overlap_maps(found, narrow),
    )


def _alone(folder: RunFolder, rows: list[MaskRow]) -> Drawing:
    listed = folder.environment.get("classes")
    classes = len(listed) if isinstance(listed, list) else 0
    seeds = len({row.seed for row in rows})
    whiskers = f"; whiskers: ± 1 standard deviation over {seeds} seeds" if seeds > 1 else ""
    several = len({row.source for row in rows}) > 1
    bars = "Bars: means over sources" if several else "Bars: the one source"
    return Drawing(
        "mask_alone",
        "What the mask alone knows",
        "Source accuracy before any fine-tuning: with all trained weights; with the frozen ones alone, "
        "the others set to 0; and with the free ones alone. A mask that found what the source needs "
        "keeps the second near the first, and takes the third down. A mask that freezes little keeps "
        "little here, and may still do well above: fine-tuning starts from values, not from zeros. "
        f"{bars}{whiskers}.",
        "Bars of source accuracy under W, under W times the mask and under its inverse, by strategy.",
        lambda narrow: mask_alone(rows, classes, narrow),
        mask_alone_html(rows),
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


def _weights(folder: RunFolder, masks: list[MaskFile]) -> Drawing:
    given = folder.config.get("naive_k")
    k = float(given) if isinstance(given, int | float) else 1.0
    reach = "one standard deviation σ" if k == 1.0 else f"{k:g} standard deviations σ"
    normal = 100 * math.erfc(k / math.sqrt(2))
    name, seed = masks[0].last, masks[0].seed
    others = len(masks[0].shapes) - 1
    more = f" {others} more masked parameters lie in the mask files." if others else ""
    return Drawing(
        "figure4_weights",
        "Trained weights and the naive rule",
        f"Values of “{name}” after training on each source (seed {seed}). The naive mask freezes what "
        f"lies more than {reach} from the mean µ; on a normal distribution that is "
        f"{normal:.1f}\u00a0% of the weights.{more} Figure 4 of the paper.",
        "Histogram of the trained weights of each source with mean and standard deviation.",
        lambda narrow: weight_histograms(masks, narrow, k),
    )
