"""Errors -> messages and exit codes."""

from __future__ import annotations

import sys

from .. import errors

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.RequestError, 2),
    (errors.ModelError, 3),
    (errors.OutOfMemoryError, 4),
    (errors.BackendUnavailableError, 7),
    (errors.PlanError, 4),
    (errors.SafetyUnavailableError, 5),
    (errors.OutputError, 6),
    (errors.Cancelled, 130),
    (errors.Flux2Error, 1),
)
"""0 is success; 1 any other error of ours; 2 also stands for wrong options."""


def report(error: Exception) -> int:
    """Print an error of ours as one line and return its exit code; anything else is a bug and raised again."""
    for kind, code in EXIT_CODES:
        if isinstance(error, kind):
            print(f"flux2-local: {error}", file=sys.stderr)
            return code
    raise error
