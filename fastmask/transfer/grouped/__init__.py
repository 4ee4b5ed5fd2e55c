"""The stages for many runs at once: the same mathematics as source.py, binary.py and target.py, stacked."""

from fastmask.transfer.grouped import binary, editor, source, target

__all__ = ["binary", "editor", "source", "target"]
