"""A markdown table and a roofline of a benchmark's CSV.

python benchmarks/figures.py benchmarks/results/amd-epyc-2-cores-avx512.csv [--out FOLDER]

Writes <stem>.md, <stem>-roofline.png and <stem>-roofline.svg. Left: cases with products, operations a byte
against operations a second, under this device's measured bandwidth and matrix product; filled points are
bound by bytes, hollow ones by arithmetic. Right: cases that only move bytes, as shares of the bandwidth;
those that draw random numbers are bound by integer arithmetic and stay below it.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastmask._benchmarks import harness

# Okabe and Ito's colours that are told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_SHOWN = {
    "backend": "back end", "dtype": "dtype", "shape": "shape", "density": "density", "p50_ms": "ms",
    "gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s", "floor_share": "of the floor",
}  # fmt: skip


def read(table: Path) -> list[harness.Row]:
    """The rows of a CSV file, the last of each case where it was measured again.

    Raises:
        ValueError: it has other columns, or no rows.
    """
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != harness.COLUMNS:
            raise ValueError(f"{table}: not a table of this version's benchmarks")
        key = ("device", "op", "backend", "dtype", "shape", "density", "threads", "malloc", "clock")
        rows = {tuple(row[name] for name in key): row for row in reader}
    if not rows:
        raise ValueError(f"{table}: no rows")
    return list(rows.values())


def markdown(rows: Sequence[harness.Row]) -> str:
    """Tables, one for each op, of what was measured."""
    first = rows[0]
    where = f"{first['device']}, torch {first['torch']}, Triton {first['triton']}"
    roofs = sorted({r["roof_gb_per_s"] for r in rows}, key=float)
    peaks: dict[str, set[str]] = {}
    for row in rows:
        if row["roof_gflop_per_s"]:
            peaks.setdefault(row["dtype"], set()).add(row["roof_gflop_per_s"])
    span = roofs[0] if len(roofs) == 1 else f"{roofs[0]} to {roofs[-1]}"
    rates = "; ".join(
        f"{dtype} product {max(map(float, found)):.0f} GFLOP/s" for dtype, found in peaks.items()
    )
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    said = [
        f"# {where}",
        "",
        f"Commit {commits}. Measured bandwidth {span} GB/s" + (f"; {rates}." if rates else "."),
        "Median of the turns; ratios are how many times longer the others take, from the same run.",
    ]
    clocks = sorted({_conditions(r) for r in rows})
    said += [f"Counted: {'; '.join(clocks)}."]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        ratios = [c for c in harness.COLUMNS if c[:2] == "x_" and any(row[c] for row in mine)]
        shown = [name for name in _SHOWN if any(row[name] for row in mine)]
        heads = [*(_SHOWN[name] for name in shown), *(c[2:].replace("_", " ") for c in ratios)]
        said += ["", f"## {op}", "", _line(heads), _line("---" for _ in heads)]
        for row in mine:
            cells = [_cell(row, name) for name in shown]
            said.append(_line([*cells, *(f"{row[c]}x" if row[c] else "" for c in ratios)]))
    return "\n".join(said) + "\n"


def _conditions(row: harness.Row) -> str:
    if not row["threads"]:
        return row["clock"]
    return f"{row['clock']} time, {row['threads']} threads, {row['malloc']} malloc"


def _cell(row: harness.Row, name: str) -> str:
    if name == "floor_share":
        return f"{row[name]} ({row['bound']})"
    if name == "shape" and row["malloc"] == "tuned":
        return f"{row[name]} (tuned malloc)"
    return row[name] if name != "p50_ms" else f"{float(row[name]):.4g}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def roofline(rows: Sequence[harness.Row], files: Sequence[Path]) -> None:
    """Draw the figure into files, each by its suffix.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    products = [row for row in rows if row["gflop_per_s"]]
    movers = [row for row in rows if not row["gflop_per_s"]]
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "fastmask"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6.2), width_ratios=(1.55, 1), layout="constrained"
    )
    _products(left, products)
    _movers(right, movers)
    first = rows[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    figure.suptitle(f"{first['device']}{threads}, torch {first['torch']}", fontsize=12)
    for file in files:
        figure.savefig(
            file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None}
        )
    plt.close(figure)


def _products(axes: Any, rows: Sequence[harness.Row]) -> None:
    """Operations a byte against operations a second."""
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity, FLOP a byte",
        ylabel="achieved, GFLOP/s",
        title="ops with a product",
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if not rows:
        axes.text(0.5, 0.5, "none measured", transform=axes.transAxes, ha="center")
        return
    at = [float(r["gflop_per_s"]) / float(r["gb_per_s"]) for r in rows if float(r["gb_per_s"])]
    bandwidth = statistics.median(float(r["roof_gb_per_s"]) for r in rows)
    peaks: dict[str, float] = {}
    for row in rows:
        peaks[row["dtype"]] = max(peaks.get(row["dtype"], 0.0), float(row["roof_gflop_per_s"]))
    low, high = min(at) / 1.6, max(*at, *(p / bandwidth for p in peaks.values())) * 2.5
    for dtype, peak in peaks.items():
        line = [low, peak / bandwidth, high]
        axes.plot(
            line, [min(peak, x * bandwidth) for x in line], color="#555555", linewidth=1.2, zorder=1
        )
        axes.annotate(
            f"{dtype} product {peak:,.0f} GFLOP/s", (high, peak), xytext=(-2, 4),
            textcoords="offset points", ha="right", fontsize=9, color="#333333",
        )  # fmt: skip
    axes.text(
        low * 1.1, low * 1.25 * bandwidth, f"{bandwidth:,.4g} GB/s", fontsize=9, color="#333333",
        rotation=math.degrees(math.atan(bandwidth)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    kinds = list(dict.fromkeys((r["op"], r["backend"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys((op, backend) for op, backend, _ in kinds))
    dtypes = list(dict.fromkeys(dtype for *_, dtype in kinds))
    for op, backend, dtype in kinds:
        mine = [r for r in rows if (r["op"], r["backend"], r["dtype"]) == (op, backend, dtype)]
        colour = COLOURS[names.index((op, backend)) % len(COLOURS)]
        mark = MARKS[dtypes.index(dtype) % len(MARKS)]
        for bound, face in (("bytes", colour), ("flops", "none")):
            some = [r for r in mine if r["bound"] == bound and float(r["gb_per_s"])]
            axes.scatter(
                [float(r["gflop_per_s"]) / float(r["gb_per_s"]) for r in some],
                [float(r["gflop_per_s"]) for r in some],
                marker=mark, s=34, facecolors=face, edgecolors=colour, linewidths=1.2, zorder=3,
            )  # fmt: skip
        axes.scatter([], [], marker=mark, s=34, color=colour, label=f"{op}, {backend}, {dtype}")
    for said, face in (("bound by bytes", "#777777"), ("bound by arithmetic", "none")):
        axes.scatter([], [], marker="o", s=34, facecolors=face, edgecolors="#777777", label=said)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)


def _movers(axes: Any, rows: Sequence[harness.Row]) -> None:
    """Shares of the bandwidth, a line for each case."""
    axes.set(xlabel="share of the measured bandwidth", title="ops that move bytes")
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if not rows:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none measured", transform=axes.transAxes, ha="center")
        return
    labels = [f"{r['op']} {r['dtype']} {r['shape']}, {r['backend']}" for r in rows]
    names = list(dict.fromkeys(r["op"] for r in rows))
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        share = float(row["gb_per_s"]) / float(row["roof_gb_per_s"])
        colour = COLOURS[names.index(row["op"]) % len(COLOURS)]
        axes.plot([0, share], [place, place], color=colour, linewidth=1.4, alpha=0.5)
        axes.scatter([share], [place], color=colour, s=30, zorder=3)
    axes.axvline(1, color="#555555", linewidth=1.2)
    axes.set_yticks(list(places), labels, fontsize=min(8, 260 / max(len(rows), 1)))
    axes.set_ylim(0.2, len(rows) + 0.8)
    axes.set_xlim(left=0)


def write(table: Path, folder: Path) -> list[Path]:
    """Write the table and, where matplotlib is installed, the figure; return the files written."""
    rows = read(table)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"{table.stem}.md"
    text.write_text(markdown(rows), encoding="utf-8")
    pictures = [folder / f"{table.stem}-roofline{suffix}" for suffix in (".png", ".svg")]
    try:
        roofline(rows, pictures)
    except ModuleNotFoundError:
        return [text]
    return [text, *pictures]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the files [beside the CSV]")
    given = parser.parse_args()
    for written in write(given.csv, given.out or given.csv.parent):
        print(written)
