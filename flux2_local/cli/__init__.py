"""The command line: ``flux2-local``. Thin: it turns arguments into a Request and a Result into lines."""

from __future__ import annotations

import sys

import typer

from .app import app
from .errors import report

__all__ = ["app", "main"]

INTERRUPTED = 130


def main(command: typer.Typer = app, brought: object = None) -> None:
    """Entry point. Errors become one message and an exit code; Ctrl-C leaves with 130 and nothing half-written.

    Args:
        command: what is run.
        brought: what it finds as its context's ``obj``.
    """
    try:
        command(obj=brought)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # what typer makes of Ctrl-C
            raise
        print("Stopped; nothing was written.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(report(error))
