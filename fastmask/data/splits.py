"""Stratified splits that keep groups whole, by hashing: the same on every machine and version."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Index tensors (int64, ascending) into a domain; `val` is held out of the training part on request."""

    train: Tensor
    test: Tensor
    val: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class Item:
    """One picture as a split sees it; `cell` is its class within its domain."""

    cell: tuple[str, int]
    row: int
    group: str


def items_of(
    labels: Mapping[str, Tensor],
    groups: Mapping[str, tuple[str, ...]],
    rows: Mapping[str, Tensor] | None = None,
) -> list[Item]:
    """List the pictures of all domains, or those in `rows` alone."""
    found = []
    for domain, said in labels.items():
        classes = said.tolist()
        chosen = range(len(classes)) if rows is None else rows[domain].tolist()
        found += [Item((domain, classes[row]), row, groups[domain][row]) for row in chosen]
    return found


def take(items: list[Item], share: float, seed: int, purpose: str) -> dict[str, set[int]]:
    """Choose `round(share * n)` pictures of each class of each domain, at least one and never all.

    Pictures of one group are taken together, across classes and domains; where groups of several do not
    add up, the number comes as close as they allow. The order is that of sha256(purpose, seed, group):
    it depends on no library's generator, and a picture added to a folder moves few others.

    Args:
        items: the pictures to choose from.
        share: of each class, in (0, 1).
        seed: any integer.
        purpose: keeps two choices with one seed apart.

    Returns:
        Rows taken of each domain.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    size: dict[tuple[str, int], int] = defaultdict(int)
    for item in items:
        groups[item.group].append(item)
        size[item.cell] += 1
    want = {cell: min(max(round(share * n), 1), n - 1) for cell, n in size.items()}
    keep = {cell: n - want[cell] for cell, n in size.items()}
    taken: dict[str, set[int]] = {domain: set() for domain, _ in size}
    started: dict[bool, set[tuple[str, int]]] = {True: set(), False: set()}

    def settle(members: list[Item], chosen: bool) -> None:
        left = want if chosen else keep
        for item in members:
            left[item.cell] -= 1
            started[chosen].add(item.cell)
            if chosen:
                taken[item.cell[0]].add(item.row)

    def excess(members: list[Item], left: Mapping[tuple[str, int], int]) -> int:
        counts: dict[tuple[str, int], int] = defaultdict(int)
        for item in members:
            counts[item.cell] += 1
        return sum(max(n - left[cell], 0) for cell, n in counts.items())

    drawn = {group: _draw(f"{purpose}\0{seed}\0{group}") for group in groups}
    order = sorted(groups, key=lambda group: (drawn[group], group))
    for group in (g for g in order if len(groups[g]) > 1):
        members = groups[group]
        over, under = excess(members, want), excess(members, keep)
        if over == under == 0:
            # A second draw: the first one already orders the groups.
            chosen = _draw(f"side\0{purpose}\0{seed}\0{group}") < share
        elif over == under:
            chosen = any(item.cell not in started[True] for item in members)
        else:
            chosen = over < under
        settle(members, chosen)
    for group in (g for g in order if len(groups[g]) == 1):
        settle(groups[group], want[groups[group][0].cell] > 0)
    return taken


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
