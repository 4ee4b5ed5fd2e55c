"""Masks over layers of the backbone as well as the head: learned and fine-tuned end to end, run by run."""

from fastmask.transfer.network.sweep import run

__all__ = ["run"]
