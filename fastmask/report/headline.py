"""What a run found, in sentences computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from fastmask.report import metrics
from fastmask.report.metrics import Spread
from fastmask.report.noise import listed, noise
from fastmask.report.palette import strategy_label
from fastmask.report.rows import MASKED, Row


def headline(rows: Sequence[Row]) -> list[str]:
    """Say who kept the source best, by how much, at what cost, and how sure that is."""
    if not rows:
        return ["No run has finished yet."]
    found: list[str] = []
    if metrics.of(rows, "binary"):
        found += _contest(rows)
    lead = next((n for n in ("binary", "editor", *MASKED) if metrics.of(rows, n)), None)
    if lead is None:
        return ["No masked run has finished yet: only the baselines are here."]
    gain = metrics.mean_source_gain(rows, lead)
    change = metrics.mean_target_change(rows, lead)
    if gain is None or change is None:
        found.append("There is no unmasked fine-tuning to compare with, so no gain can be stated.")
        return found
    found.append(
        f"Compared with unmasked fine-tuning, the {strategy_label(lead)} mask left source accuracy "
        f"{_points(gain)} and target accuracy {_points(change)} "
        f"({_over(rows, gain)}{_intervals(gain, change)})."
    )
    density = metrics.level(metrics.of(rows, lead), lambda row: row.frozen_density)
    if density is not None:
        found.append(
            f"It froze {100 * density.mean:.0f} % of the masked weights and left the rest to the target."
        )
    return found + noise(rows)


def _contest(rows: Sequence[Row]) -> list[str]:
    contest = metrics.keeps_source_best(rows)
    if not contest.rivals or not contest.compared:
        return []
    rivals = "the " + listed([strategy_label(name) for name in contest.rivals])
    won, of = len(contest.won), len(contest.compared)
    masks = "mask" if len(contest.rivals) == 1 else "masks"
    if of == 1:
        kept = "kept" if won else "did not keep"
        said = f"The binary mask {kept} the source better than {rivals} {masks}."
        return [said, *_lead(rows, contest.rivals)]
    count = "none" if won == 0 else str(won)
    lost = [name for name in contest.compared if name not in contest.won]
    but = f" (not {', '.join(lost)})" if 0 < len(lost) <= 3 and won else ""
    said = f"The binary mask kept the source better than {rivals} {masks} in {count} of {of} sources{but}."
    return [said, *_lead(rows, contest.rivals)]


def _lead(rows: Sequence[Row], rivals: Sequence[str]) -> list[str]:
    """How far the binary mask is ahead of the strategy that comes nearest, seed by seed."""
    found = {
        rival: lead
        for rival in rivals
        if (lead := metrics.mean_source_gain(rows, "binary", against=rival)) is not None
    }
    if not found:
        return []
    nearest = min(found, key=lambda rival: found[rival].mean)
    lead = found[nearest]
    spread = "" if lead.std is None else f"\u00a0±\u00a0{100 * lead.std:.1f}"
    said = (
        f"Its mean lead in source accuracy over the nearest, {strategy_label(nearest)}, is "
        f"{_signed(lead.mean)}{spread} points"
    )
    if lead.ci95 is None:
        return [f"{said}."]
    noise = ", which is within noise" if lead.within_noise else ""
    return [f"{said} (95 % interval {_interval(lead)}){noise}."]


def _points(value: Spread) -> str:
    size = 100 * abs(value.mean)
    if round(size, 1) == 0.0:
        text = "unchanged"
        return text if value.std is None else f"{text} (±\u00a0{100 * value.std:.1f} points)"
    more = "" if value.std is None else f"\u00a0±\u00a0{100 * value.std:.1f}"
    return f"{size:.1f}{more} points {'higher' if value.mean > 0 else 'lower'}"


def _intervals(gain: Spread, change: Spread) -> str:
    if gain.ci95 is None or change.ci95 is None:
        return ""
    return f"; 95 % intervals {_interval(gain)} and {_interval(change)}"


def _interval(value: Spread) -> str:
    return " to ".join(map(_signed, value.ci95 or ()))


def _signed(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def _over(rows: Sequence[Row], value: Spread) -> str:
    masked = [row for row in rows if row.strategy in MASKED]
    pairs = len({(row.source, row.target) for row in masked})
    seeds = "one seed" if value.n == 1 else f"±\u00a01 standard deviation over {value.n} seeds"
    return f"mean over {pairs} pair{'s' if pairs != 1 else ''} of domains, {seeds}"
