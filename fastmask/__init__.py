"""fastmask: one-bit masks over the weights of a pretrained network."""

from fastmask import errors, ops
from fastmask.bits import BitMask

__version__ = "0.1.0"

__all__ = ["BitMask", "errors", "ops"]
