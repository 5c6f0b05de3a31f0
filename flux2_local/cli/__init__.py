"""The command line: ``flux2-local``. Thin: it turns arguments into a Request and a Result into lines."""

from __future__ import annotations

import sys

from .app import app
from .errors import report

__all__ = ["app", "main"]


def main() -> None:
    """Entry point. Errors become one message and an exit code; Ctrl-C leaves with 130 and nothing half-written."""
    try:
        app()
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(report(error))
