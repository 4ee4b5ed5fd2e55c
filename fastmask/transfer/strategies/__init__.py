"""Stage 2: which weights of the head the source needs. One module a strategy, each with `find`."""

from fastmask.transfer.strategies import binary, editor, kl, lowrank, magnitude, naive, random
from fastmask.transfer.strategies.found import Found, MaskWarning

# By the name it has in a sweep's settings.
FIND = {
    "naive": naive.find,
    "editor": editor.find,
    "binary": binary.find,
    "kl": kl.find,
    "lowrank": lowrank.find,
    "magnitude": magnitude.find,
    "random": random.find,
}

__all__ = [
    "FIND", "Found", "MaskWarning", "binary", "editor", "kl", "lowrank", "magnitude", "naive", "random",
]  # fmt: skip
