"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fastmask.errors import RunFolderError


def write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; a reader, and a crash, see the old file or the new one.

    Raises:
        RunFolderError: the folder cannot be written to; the message names the file.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; a report is as readable as any file its owner makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error})") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
