"""The errors of fastmask that are no plain TypeError or ValueError; `require` for optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class FastmaskError(Exception):
    """Base of all named fastmask errors."""


class BackendUnavailable(FastmaskError, RuntimeError):
    """A back end was named that cannot run here; the message says why."""


class MissingPackage(FastmaskError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class DataError(FastmaskError, ValueError):
    """A data set cannot be used; the message names each file, class or domain at fault."""


class WeightsError(FastmaskError, ValueError):
    """A weight file cannot be used: a pickle, truncated, or of another network."""


class MaskFileError(FastmaskError, ValueError):
    """A mask file is damaged, of an unknown version, or belongs to other weights."""


class TrainingDiverged(FastmaskError, ArithmeticError):
    """A loss, score or logit left the finite numbers; the message says at which step of which run."""


class FrozenEntriesMoved(FastmaskError, AssertionError):
    """Entries that a mask freezes differ from their recorded bits."""


class RunFolderError(FastmaskError, OSError):
    """A run folder cannot be written to or does not hold a finished run."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or raise MissingPackage naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{module} is needed here and cannot be imported ({error}); "
            f"install it with: pip install 'fastmask[{extra}]'"
        ) from error
