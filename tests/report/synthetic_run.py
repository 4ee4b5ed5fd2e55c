"""A run folder made up for tests, in the format of docs/design.md, with numbers like a real sweep's."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PACS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DIGITS = ("handwritten", "inverted-and-noisy", "printed", "rotated_and_thickened_outlines")
COLUMNS = (
    "source,target,strategy,start,seed,frozen_density,source_accuracy,target_accuracy,"
    "source_accuracy_before,setting"
)
# Mean effect on (source, target) accuracy against unmasked fine-tuning, and the frozen share.
EFFECT = {
    "none": (0.0, 0.0, 0.0),
    "naive": (0.012, -0.004, 0.31),
    "editor": (0.006, -0.002, 0.16),
    "binary": (0.055, -0.022, 0.83),
    "kl": (0.045, -0.012, 0.62),
    "lowrank": (0.02, -0.006, 0.41),
    "magnitude": (0.018, -0.008, 0.55),
    "random": (0.001, -0.003, 0.55),
    "scratch": (-0.25, 0.012, 0.0),
}
# Settings that each strategy can be varied by, as a sweep with `--curves` has them.
VARY = {
    "naive": {"naive_k": (0.25, 0.5, 1, 1.5, 2)},
    "editor": {"editor_share": (0.2, 0.4, 0.55, 0.7, 0.85)},
    "lowrank": {"editor_share": (0.2, 0.4, 0.55, 0.7, 0.85)},
    "magnitude": {"density": (0.2, 0.4, 0.55, 0.7, 0.85)},
    "random": {"density": (0.2, 0.4, 0.55, 0.7, 0.85)},
    "binary": {
        "density": (0.2, 0.4, 0.55, 0.7, 0.85),
        "beta": (0.1, 0.3, 1, 3),
        "tau": (0.25, 0.5, 1, 2, 4),
    },
}
VARY["kl"] = VARY["binary"]
MASK_COLUMNS = (
    "source,strategy,seed,setting,frozen_density,positive_share,source_accuracy,kept_accuracy,"
    "inverted_accuracy"
)


def make_run(
    path: Path,
    *,
    domains: Sequence[str] = PACS,
    sources: Sequence[str] | None = None,
    classes: Sequence[str] = PACS_CLASSES,
    features: int = 1280,
    strategies: Sequence[str] = ("naive", "editor", "binary"),
    baselines: Sequence[str] = ("none", "scratch"),
    starts: Sequence[str] = ("source-start", "source-end", "random"),
    seeds: int = 3,
    hidden: int = 0,
    keep: float = 1.0,
    vary: bool = False,
    mask_table: bool = True,
) -> Path:
    """Write a run folder; `keep` < 1 leaves out the last runs, as an interrupted sweep does.

    `vary` adds the settings of VARY; without `mask_table` the folder is one of an older version.
    """
    rng = np.random.default_rng(7)
    sources = tuple(domains if sources is None else sources)
    (path / "masks").mkdir(parents=True)
    rows, masks = [], []
    for seed in range(seeds):
        for i, source in enumerate(sources):
            before = 0.97 - 0.04 * i + rng.normal(0, 0.006)
            for j, target in enumerate(domains):
                if target == source:
                    continue
                base = before - 0.18 - 0.05 * j + rng.normal(0, 0.015)
                learned = 0.93 - 0.045 * j + rng.normal(0, 0.008)
                for strategy in (*baselines, *strategies):
                    gain, change, density = EFFECT[strategy]
                    begin = {"none": ["source-end"], "binary": starts}.get(strategy, starts[:1])
                    for start in begin:
                        less = 0.008 * starts.index(start) if strategy == "binary" else 0.0
                        rows.append(
                            (
                                source, target, strategy, start, seed, f"{density:.6f}",
                                f"{np.clip(base + gain - less + rng.normal(0, 0.008), 0, 1):.6f}",
                                f"{np.clip(learned + change + rng.normal(0, 0.006), 0, 1):.6f}",
                                f"{before:.6f}", "",
                            )
                        )  # fmt: skip
                    for setting, density, by in _varied(strategy) if vary else ():
                        rows.append(
                            (
                                source, target, strategy, starts[0], seed, f"{density:.6f}",
                                f"{np.clip(base + by * gain + rng.normal(0, 0.008), 0, 1):.6f}",
                                f"{np.clip(learned + by * by * change + rng.normal(0, 0.006), 0, 1):.6f}",
                                f"{before:.6f}", setting,
                            )
                        )  # fmt: skip
            for strategy in strategies:
                own = ("", EFFECT[strategy][2], 1.0)
                for setting, density, _ in (own, *(_varied(strategy) if vary else ())):
                    positive = f"{0.9 * density:.6f}" if strategy in ("binary", "kl") else ""
                    kept = before * density + rng.uniform(0, 0.05)
                    masks.append(
                        (
                            source, strategy, seed, setting, f"{density:.6f}", positive,
                            f"{before:.6f}", f"{min(kept, 1):.6f}", f"{1 / len(classes) * (1 - density):.6f}",
                        )
                    )  # fmt: skip
            for strategy in strategies:
                _write_mask(path, source, strategy, seed, classes, features, hidden, rng)
    planned = len(rows)
    rows = rows[: round(keep * len(rows))]
    with (path / "results.csv").open("w", newline="") as file:
        file.write(COLUMNS + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)
    if mask_table:
        with (path / "masks.csv").open("w", newline="") as file:
            file.write(MASK_COLUMNS + "\n")
            csv.writer(file, lineterminator="\n").writerows(masks)
    write_json(
        path / "config.json",
        {
            "data": "digits",
            "backbone": "efficientnet_lite0",
            "sources": list(sources),
            "targets": list(domains),
            "strategies": list(strategies),
            "starts": list(starts),
            "seeds": list(range(seeds)),
            "tau": 1.0,
            "samples": 4,
            "beta": 1.0,
            "density": 0.55,
        },
    )
    write_json(
        path / "environment.json",
        {
            "fastmask": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "device": "cpu",
            "planned_runs": planned,
            "batch_norm": "frozen: statistics and affine parameters of the backbone never change",
            "domains": list(domains),
            "classes": list(classes),
            "splits": {d: {"train": 448, "test": 112} for d in domains},
        },
    )
    return path


def _varied(strategy: str) -> list[tuple[str, float, float]]:
    """(setting, density, how many times the effect of the sweep's own settings)."""
    found = []
    for knob, values in VARY.get(strategy, {}).items():
        for i, value in enumerate(values):
            by = 1.0 + 0.02 * i if knob == "tau" else 0.4 + 0.3 * i
            if knob == "beta":
                by = 2.0 - 0.4 * i
            found.append((f"{knob}={value:g}", float(np.clip(0.45 * by, 0.02, 0.97)), by))
    return found


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def pack(bits: np.ndarray) -> np.ndarray:
    """Bits in the file's layout: little-endian within a byte, whole 64-bit words."""
    packed = np.packbits(bits.ravel(), bitorder="little")
    return np.pad(packed, (0, -len(packed) % 8))


def _write_mask(
    path: Path,
    source: str,
    strategy: str,
    seed: int,
    classes: Sequence[str],
    features: int,
    hidden: int,
    rng: np.random.Generator,
) -> None:
    shapes = {"head.weight": (len(classes), hidden or features)}
    if hidden:
        shapes = {"hidden.weight": (hidden, features), **shapes}
    tensors: dict[str, np.ndarray] = {}
    ones = total = 0
    for name, shape in shapes.items():
        initial = rng.uniform(-1, 1, shape) / np.sqrt(shape[1])
        weight = (initial + rng.laplace(0, 0.02, shape)).astype(np.float32)
        share = np.clip(EFFECT[strategy][2] + rng.normal(0, 0.05, (shape[0], 1)), 0.02, 0.98)
        frozen = rng.random(shape) < share
        tensors[f"{name}.frozen"] = pack(frozen)
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.initial"] = initial.astype(np.float32)
        if strategy != "naive":
            tensors[f"{name}.scores"] = rng.normal(0, 1, shape).astype(np.float32)
        ones, total = ones + int(frozen.sum()), total + frozen.size
    metadata = {
        "fastmask_format": "1",
        "source": source,
        "strategy": strategy,
        "seed": str(seed),
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "density": repr(ones / total),
        "classes": json.dumps(list(classes)),
    }
    save_file(tensors, path / "masks" / f"{source}-{strategy}-seed{seed}.safetensors", metadata)
