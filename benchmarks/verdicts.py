"""Aims of a benchmark, and which of them were reached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Verdict = tuple[str, str, bool | None]
"""What was held to an aim, the aim, and whether it was reached; None where a figure for it is missing."""


def tally(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """How often each aim was ``reached``, and where it was ``missed`` or could not be ``judged``."""
    reached: dict[str, int] = {}
    missed, unjudged = [], []
    for what, aim, met in verdicts:
        reached[aim] = reached.get(aim, 0) + bool(met)
        if not met:
            (unjudged if met is None else missed).append(f"{what}: {aim}")
    return {"reached": reached, "missed": missed, "unjudged": unjudged}


def told(found: dict[str, Any]) -> str:
    """A :func:`tally` in a line each."""
    lines = [f"reached by {count}: {aim}" for aim, count in found["reached"].items() if count]
    lines += [f"missed: {one}" for one in found["missed"]]
    return "\n".join(lines + [f"not judged, a figure is missing: {one}" for one in found["unjudged"]])
