"""Independent pieces of a sweep on several threads, each a single-threaded computation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Run torch on one CPU thread in each thread that begins here; yield how many there were before.

    Heads are small: a step takes less time on one thread than several take to meet, and its sums do not
    depend on how many there are. The cores are for runs beside each other (`in_order`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def in_order(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Run tasks on `workers` threads and yield their results in the order of the tasks.

    Whatever ends the iteration, an error of a task or Ctrl-C, what is running is finished and what has
    not begun is left.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, min(workers, len(tasks))))
    try:
        for future in [pool.submit(task) for task in tasks]:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
