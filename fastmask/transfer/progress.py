"""How a sweep says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with a label, things done and things in all.
Progress = Callable[[str, int, int], None]


def say(progress: Progress | None, label: str, done: int, total: int) -> None:
    """Call it, where there is one."""
    if progress is not None:
        progress(label, done, total)
