"""What decides the bits of a masked weight: fixed bits, or scores that are learned."""

from fastmask.masks.fixed import FixedMask
from fastmask.masks.gumbel import GumbelMask
from fastmask.masks.mask import Mask
from fastmask.masks.threshold import ThresholdMask
from fastmask.masks.topk import TopKMask

__all__ = ["FixedMask", "GumbelMask", "Mask", "ThresholdMask", "TopKMask"]
