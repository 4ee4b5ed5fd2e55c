"""Which differences to unmasked fine-tuning are within noise, in words."""

from __future__ import annotations

from collections.abc import Sequence

from fastmask.report.palette import strategy_label
from fastmask.report.rows import Row
from fastmask.report.tables import StrategyLine, strategy_table


def noise(rows: Sequence[Row]) -> list[str]:
    """Say which mean differences have a 95 % confidence interval over seeds that contains 0."""
    lines = [line for line in strategy_table(rows) if line.gain and line.change]
    known = [line for line in lines if line.gain and line.gain.n > 1]
    if not lines:
        return []
    if not known:
        return [
            "With one seed nothing can be said about noise: how much another seed would change any of "
            "these differences is not known."
        ]
    said = []
    inside = 0
    for word, values in (
        ("source gain", {_name(line, lines): line.gain for line in known}),
        ("target change", {_name(line, lines): line.change for line in known}),
    ):
        names = [name for name, value in values.items() if value and value.within_noise]
        inside += len(names)
        if names:
            said.append(f"the {word} of {listed(names)}")
    counts = sorted({line.gain.n for line in known if line.gain})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    if not said:
        found = [
            f"No difference is within noise: every 95 % confidence interval over {seeds} leaves out 0."
        ]
    else:
        rest = (
            "The other differences to unmasked fine-tuning are beyond it."
            if inside < 2 * len(known)
            else "No difference to unmasked fine-tuning is beyond it."
        )
        found = [
            f"Within noise, with 0 in the 95 % confidence interval over {seeds}: {'; '.join(said)}. {rest}"
        ]
    if alone := [_name(line, lines) for line in lines if line not in known]:
        found.append(f"Of {listed(alone)}, with one seed, nothing can be said.")
    if _uneven(rows):
        found.append(
            "Not all seeds have run on the same pairs of domains yet: until they have, these intervals "
            "mix what seeds change with what pairs change."
        )
    return found


def _uneven(rows: Sequence[Row]) -> bool:
    """Whether a strategy has run on other pairs with one seed than with another."""
    pairs: dict[tuple[str, str, int], set[tuple[str, str]]] = {}
    for row in rows:
        pairs.setdefault((row.strategy, row.start, row.seed), set()).add((row.source, row.target))
    first: dict[tuple[str, str], set[tuple[str, str]]] = {}
    return any(
        first.setdefault((strategy, start), found) != found
        for (strategy, start, _), found in pairs.items()
    )


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _name(line: StrategyLine, lines: Sequence[StrategyLine]) -> str:
    several = sum(other.strategy == line.strategy for other in lines) > 1
    label = strategy_label(line.strategy)
    return f"{label} from {line.start}" if several and line.start else label
