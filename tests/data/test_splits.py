"""Splits: whole groups, exact shares, and nothing but hashes decides."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmask.data.domain_set import DomainSet
from fastmask.data.splits import Item, take
from fastmask.errors import DataError


def domain_set(
    labels: dict[str, list[int]],
    groups: dict[str, tuple[str, ...]] | None = None,
    classes: int = 2,
    fraction: float = 0.3,
    fixed: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> DomainSet:
    """A set without pictures; groups are single unless given."""
    single = {d: tuple(f"{d} {i}" for i in range(len(said))) for d, said in labels.items()}
    return DomainSet(
        "made up",
        tuple(f"c{i}" for i in range(classes)),
        {domain: torch.tensor(said) for domain, said in labels.items()},
        groups or single,
        lambda domain, row: torch.zeros(3, 1, 1, dtype=torch.uint8),
        dict.fromkeys(labels, ""),
        lambda domain, row: f"{domain} {row}",
        test_fraction=fraction,
        fixed=fixed,
    )


sizes = st.lists(st.integers(2, 12), min_size=2, max_size=4)
shares = st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.8])


@given(sizes, shares, st.integers(0, 2**40))
def test_shares_are_exact_where_groups_are_single(ns: list[int], share: float, seed: int) -> None:
    said = [label for label, n in enumerate(ns) for _ in range(n)]
    made = domain_set({"a": said, "b": said[::-1]}, classes=len(ns), fraction=share)
    for domain in made.domains:
        split, labels = made.split(domain, seed), made.labels(domain)
        assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(len(said)))
        assert split.val.numel() == 0
        got = Counter(labels[split.test].tolist())
        assert got == {label: min(max(round(share * n), 1), n - 1) for label, n in enumerate(ns)}


@given(st.data(), sizes, shares, st.integers(0, 1000), st.sampled_from([0.0, 0.2, 0.5]))
def test_no_group_is_separated(
    data: st.DataObject, ns: list[int], share: float, seed: int, holdout: float
) -> None:
    said = [label for label, n in enumerate(ns) for _ in range(n)]
    # Few names, so that groups span classes and domains.
    names = st.integers(0, 2 * len(said)).map(lambda i: f"g{i}")
    groups = {
        d: tuple(data.draw(st.lists(names, min_size=len(said), max_size=len(said)))) for d in "ab"
    }
    try:
        made = domain_set({"a": said, "b": said}, groups, len(ns), share)
        parts = {domain: made.split(domain, seed, holdout) for domain in made.domains}
    except DataError as error:
        if "cannot be split" not in str(error) and "no image in the" not in str(error):
            raise
        return
    where: dict[str, set[str]] = {}
    for domain, split in parts.items():
        for side in ("train", "test", "val"):
            for row in getattr(split, side).tolist():
                where.setdefault(groups[domain][row], set()).add(side)
        rows = [*split.train.tolist(), *split.test.tolist(), *split.val.tolist()]
        assert sorted(rows) == list(range(len(said)))
    assert all(len(sides) == 1 for sides in where.values())


def test_the_order_is_that_of_the_hashes_alone() -> None:
    names = tuple(f"picture {i}" for i in range(20))
    items = [Item(("a", 0), row, name) for row, name in enumerate(names)]
    for seed in range(5):
        order = sorted(
            range(20), key=lambda i: hashlib.sha256(f"test\0{seed}\0{names[i]}".encode()).digest()
        )
        assert take(items, 0.3, seed, "test") == {"a": set(order[:6])}
        assert take(items[::-1], 0.3, seed, "test") == {"a": set(order[:6])}
    assert take(items, 0.3, 0, "test") != take(items, 0.3, 1, "test")
    assert take(items, 0.3, 0, "test") != take(items, 0.3, 0, "val")


def test_equal_groups_fill_the_share_exactly() -> None:
    """Ten groups of eight in two domains, as the typefaces lie: three of ten groups are tested on."""
    said = [label for label in range(2) for _ in range(80)]
    named = tuple(f"{label} {i // 8}" for label in range(2) for i in range(80))
    made = domain_set({"a": said, "b": said}, {"a": named, "b": named})
    for seed in range(20):
        first, second = made.split("a", seed), made.split("b", seed)
        assert torch.equal(first.test, second.test)
        assert Counter(made.labels("a")[first.test].tolist()) == {0: 24, 1: 24}


def test_copies_do_not_all_fall_on_one_side() -> None:
    """Thirty pairs among sixty singles: a share of the pairs near the share of the whole is tested on."""
    said = [0] * 120 + [1] * 2
    named = (*(f"pair {i // 2}" for i in range(60)), *(f"single {i}" for i in range(60)), "x", "y")
    made = domain_set({"a": said, "b": said}, {"a": named, "b": tuple(f"b{n}" for n in named)})
    tested = sum(int((made.split("a", seed).test < 60).sum()) for seed in range(40))
    # 1,200 pairs drawn with p = 0.3: six standard deviations are 95 pairs.
    assert abs(tested / 2 - 360) < 95


def test_the_held_out_part_comes_from_training() -> None:
    said = [0] * 20 + [1] * 10
    made = domain_set({"a": said, "b": said})
    plain, held = made.split("a", 3), made.split("a", 3, holdout=0.2)
    assert torch.equal(plain.test, held.test)
    assert sorted([*held.train.tolist(), *held.val.tolist()]) == plain.train.tolist()
    assert Counter(made.labels("a")[held.val].tolist()) == {0: 3, 1: 1}
    assert not torch.equal(held.val, made.split("a", 4, holdout=0.2).val)


def test_given_splits_leave_the_seed_only_the_held_out_part() -> None:
    said = [0, 0, 0, 1, 1, 1]
    given_rows = (torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5]))
    made = domain_set({"a": said, "b": said}, fixed={"a": given_rows, "b": given_rows})
    for seed in range(3):
        assert torch.equal(made.split("a", seed).train, given_rows[0])
        held = made.split("a", seed, holdout=0.5)
        assert torch.equal(held.test, given_rows[1]) and len(held.val) == 2


@pytest.mark.parametrize(
    "labels, groups, said",
    [
        ([0, 0, 1], None, "a/c1: one image, which cannot be split"),
        ([0, 0], None, "a/c1: no images"),
        ([0, 0, 1, 1], ("p", "q", "r", "r"), "a/c1: 2 copies of one image"),
    ],
)
def test_classes_that_cannot_be_split_are_named(
    labels: list[int], groups: tuple[str, ...] | None, said: str
) -> None:
    named = None if groups is None else {"a": groups, "b": ("s", "t", "u", "v")}
    with pytest.raises(DataError, match=said):
        domain_set({"a": labels, "b": [0, 0, 1, 1]}, named)


def test_arguments_are_checked() -> None:
    made = domain_set({"a": [0, 0, 1, 1], "b": [0, 0, 1, 1]})
    with pytest.raises(ValueError, match="domain: expected one of a, b, got 'c'"):
        made.split("c")
    with pytest.raises(ValueError, match=r"holdout: expected a number in \[0, 1\), got 1"):
        made.split("a", 0, holdout=1)
    with pytest.raises(TypeError, match="seed: expected an int, got float"):
        made.split("a", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test_fraction"):
        domain_set({"a": [0, 0, 1, 1], "b": [0, 0, 1, 1]}, fraction=float("nan"))
    with pytest.raises(DataError, match="at least two domains, got a"):
        domain_set({"a": [0, 0, 1, 1]})
    with pytest.raises(DataError, match="at least two classes"):
        domain_set({"a": [0, 0], "b": [0, 0]}, classes=1)
