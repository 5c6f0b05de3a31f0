"""Two results side by side: what changed beyond noise.

A time has changed beyond noise where the two runs' samples do not overlap at all (with five rounds each, chance does that to
unchanged code once in 126 times) and the medians are more than 3 % apart. The ratio to diffusers within the same round is held
to the same rule, and is what counts where the machine itself was slower. Memory has changed from 5 % on, PSNR from 0.1 dB on:
the same seeds give the same pictures. Adherence is a share of so and so many things, and has changed where the two shares are
more than two standard errors of their difference apart. One that was stopped at a limit took more than its seconds say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import reason

TIME, MEMORY, QUALITY = 0.03, 0.05, 0.1
"""Smallest changes that are reported: shares of the old value, and dB."""

SAME_MACHINE = ("device", "card", "torch", "diffusers", "model", "steps", "rounds", "rounds_done", "prompts")
"""What two results should agree in to be comparable."""


@dataclass(frozen=True)
class Change:
    """One figure of one contender, before and after.

    Attributes:
        verdict: "better" or "worse" beyond noise, or "" where it may be chance.
    """

    size: str
    name: str
    figure: str
    before: float
    after: float
    verdict: str

    def __str__(self) -> str:
        change = f"{self.after / self.before - 1:+.1%}" if self.before else ""
        return f"{self.size} {self.name}: {self.figure} {self.before:.4g} -> {self.after:.4g} {change} {self.verdict}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """Every change, and what makes the two results less comparable or cannot be compared, a line each."""

    changes: tuple[Change, ...]
    caveats: tuple[str, ...]

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    def to_dict(self) -> dict[str, Any]:
        return {"changes": [asdict(change) for change in self.changes], "caveats": list(self.caveats)}


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        RequestError: the file is none.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        rows = record["rows"]
        if not all({"size", "name", "seconds", "fastest", "slowest"} <= row.keys() for row in rows):
            raise KeyError("seconds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{path} cannot be read as a result of `flux2-local bench`: {reason(error)}. Name the JSON file that it wrote."
        ) from None
    done = {row["size"]: record.get("rounds") for row in rows}  # runs that were not stopped, before it was kept
    return {"rounds_done": done, **record}


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Match the rows of two results by size and contender."""
    old, new = ({(row["size"], row["name"]): row for row in record["rows"]} for record in (before, after))
    caveats = [
        f"{name}: {before.get(name)} before, {after.get(name)} after"
        for name in SAME_MACHINE
        if before.get(name) != after.get(name)
    ]
    for keys, where in ((old.keys() - new.keys(), "before"), (new.keys() - old.keys(), "after")):
        caveats += [f"only {where}: {size} {name}" for size, name in sorted(keys)]
    changes = tuple(change for key, row in old.items() if key in new for change in changes_of(row, new[key]))
    return Comparison(changes, tuple(caveats))


def changes_of(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """The figures of one contender that both results have."""

    def change(figure: str, verdict: str) -> Change:
        return Change(old["size"], old["name"], figure, old[figure], new[figure], verdict)

    yield change("seconds", time_verdict(old, new, samples_of(old), samples_of(new), "seconds", more_is_better=False))
    if old.get("ratios") and new.get("ratios"):
        yield change("ratio", time_verdict(old, new, old["ratios"], new["ratios"], "ratio", more_is_better=True))
    for figure in ("host_bytes", "device_bytes"):
        if old.get(figure) and new.get(figure):
            share = new[figure] / old[figure] - 1
            yield change(figure, "" if abs(share) < MEMORY else "worse" if share > 0 else "better")
    if old.get("psnr") is not None and new.get("psnr") is not None:
        gain = new["psnr"] - old["psnr"]
        yield change("psnr", "" if abs(gain) < QUALITY else "better" if gain > 0 else "worse")
    if old.get("asked") and new.get("asked"):
        gain = new["adherence"] - old["adherence"]
        error = math.hypot(*(standard_error(row["adherence"] / 100, row["asked"]) for row in (old, new)))
        yield change("adherence", "" if abs(gain) <= 200 * error else "better" if gain > 0 else "worse")


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent things."""
    return math.sqrt(share * (1 - share) / count)


def samples_of(row: dict[str, Any]) -> list[float]:
    """Every sample, or the extremes where only those were kept."""
    return row.get("samples") or [row["fastest"], row["slowest"]]


def time_verdict(
    old: dict[str, Any],
    new: dict[str, Any],
    before: list[float],
    after: list[float],
    figure: str,
    *,
    more_is_better: bool,
) -> str:
    """ "better", "worse" or "" by the module's rule."""
    above, below = min(after) > max(before), max(after) < min(before)
    if not (above or below) or abs(new[figure] / old[figure] - 1) < TIME:
        return ""
    verdict, bound = ("better", new) if above == more_is_better else ("worse", old)
    return "" if bound.get("limit") else verdict
