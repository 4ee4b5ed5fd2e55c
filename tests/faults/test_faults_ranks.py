"""Two processes training one masked model: each draws as its own seed says, and all keep the same masks."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmask
from fastmask import GumbelMask, ThresholdMask
from fastmask.testing import assert_same_bits, values

RANKS = 2


class Branches(nn.Module):
    """Of the two heads only the first is used: the masks of the other get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.used, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.relu(self.body(x)))


def train(rank: int, store: str, seeds: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Three steps on this rank's own rows; the parameters, and the output before them."""
    torch.manual_seed(0)
    model = Branches()
    fastmask.mask_(model, GumbelMask(init=0.5), lambda name, _: name == "body")
    fastmask.mask_(model, ThresholdMask("kaiming"), lambda name, _: "used" in name)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        torch.manual_seed(seeds[rank])
        first = wrapped(values(4, 6)).detach()
        for step in range(3):
            model.zero_grad()
            wrapped(values(4, 6, seed=10 * rank + step)).square().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
    finally:
        dist.destroy_process_group()
    return {name: p.detach() for name, p in model.named_parameters()}, first


def both(rank: int, store: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Once with a seed for each rank, once with one for both."""
    return [train(rank, f"{store}{i}", seeds) for i, seeds in enumerate(((1, 2), (1, 1)))]


@pytest.mark.slow
def test_ranks_of_other_seeds_draw_other_noise_and_keep_equal_masks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    store = str(tmp_path / "store")
    # This process is the first rank: importing torch is most of what a second one costs.
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        other = pool.submit(both, 1, store)
        cases = list(zip(both(0, store), other.result(timeout=300), strict=True))
    start = Branches()
    for case, ((one, first), (two, second)) in enumerate(cases):
        # The same rows on both ranks: their outputs differ where the noise does.
        assert torch.equal(first, second) == (case == 1)
        assert one.keys() == two.keys() > dict(start.named_parameters()).keys()
        for name, value in one.items():
            assert_same_bits(value, two[name])
    (one, _), _ = cases[0]
    (shared, _), _ = cases[1]
    assert not torch.equal(one["body.mask.logits"], shared["body.mask.logits"])
    # The head that is not used has learnt nothing, and stopped nobody.
    assert_same_bits(one["unused.mask.scores"], shared["unused.mask.scores"])
    assert not torch.equal(one["used.mask.scores"], shared["used.mask.scores"])
