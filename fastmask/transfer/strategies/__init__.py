"""Stage 2: which weights of the head the source needs. One module a strategy, each with `find`."""

from fastmask.transfer.strategies import binary, editor, naive
from fastmask.transfer.strategies.found import Found, MaskWarning

__all__ = ["Found", "MaskWarning", "binary", "editor", "naive"]
