"""Write a file of a run folder whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fastmask import _files
from fastmask.errors import RunFolderError


def write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, making its folder where it is missing.

    Raises:
        RunFolderError: the folder cannot be written to; the message names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _files.write(path, data)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error})") from error
