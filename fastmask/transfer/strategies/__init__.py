"""Stage 2: which weights of the head the source needs. One module a strategy, each with `find`."""

from fastmask.transfer.strategies import binary, editor, naive
from fastmask.transfer.strategies.found import Found, MaskWarning

# By the name it has in a sweep's settings.
FIND = {"naive": naive.find, "editor": editor.find, "binary": binary.find}

__all__ = ["FIND", "Found", "MaskWarning", "binary", "editor", "naive"]
