"""Errors as one sentence and an exit code: 2 for what the user can set right, 1 for a run that failed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from fastmask import errors

# Raised before or while reading what was given; nothing was computed in vain.
_GIVEN = (
    ValueError,
    errors.BackendUnavailable,
    errors.MissingPackage,
    errors.RunFolderError,
)
USAGE, FAILED, INTERRUPTED = 2, 1, 130


def say(kind: str, message: str, style: str = "bold red") -> None:
    """Write `kind: message` to the terminal's error stream."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((f"{kind}: ", style), message))


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn exceptions into a sentence and an exit code; `debug` shows the traceback first."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        say("interrupted", "stopped", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, (errors.FastmaskError, ValueError, OSError))
        if known:
            say("error", str(error) or type(error).__name__)
        else:
            say("error", f"{type(error).__name__}: {error}")
            if not debug:
                say("hint", "this looks like a fault in fastmask; --debug shows where", "dim")
        raise typer.Exit(USAGE if isinstance(error, _GIVEN) else FAILED) from None
