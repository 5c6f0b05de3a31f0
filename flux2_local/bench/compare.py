"""Two results side by side: what changed beyond noise.

Speed is judged by the ratio to diffusers within the same round, which stays where the machine as a whole was slower or faster; by
seconds only where a side has no ratio, and never where a side has fewer than :data:`FEW` samples. It has changed beyond noise
where the two runs' samples do not overlap at all (chance does that to unchanged code once in 35 times with four rounds each, once
in 126 with five) and the medians are more than 3 % apart. Memory has changed from 5 % on, PSNR from 0.1 dB on: the same seeds
give the same pictures. Adherence is a share of so and so many things, and has changed where the two shares are more than two
standard errors of their difference apart. One that was stopped at a limit took more than its seconds say. One that ran to the end
and then was refused, failed or was stopped is worse, and the other way round better.
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
from .environment import DRIVER, PACKAGES
from .metrics import SAME

TIME, MEMORY, QUALITY = 0.03, 0.05, 0.1
"""Smallest changes that are reported: shares of the old value, and dB."""

FEW = 4
"""Samples below which nothing is said of a time: those of unchanged code do not overlap too often."""

SAME_MACHINE = (
    "device", "instructions", "threads", "card", "cuda", DRIVER, *(name for name in PACKAGES if name != "flux2-local"), "python",
    "model", "steps", "rounds", "rounds_done", "apart", "limit", "held_against", "prompts",
)  # fmt: skip
"""What two results should agree in to be comparable."""

Key = tuple[str, str]
Rows = dict[Key, dict[str, Any]]
Reasons = dict[Key, str]
"""By size and contender."""


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
    """A result; pictures that equal the reference's have today's PSNR of such, whatever it was when they were measured.

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
    for row in rows:
        if row.get("differ") == 0:
            row["psnr"] = SAME
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
    not_before, not_after = refusals(before), refusals(after)
    only = (
        (old.keys() - new.keys() - not_after.keys(), "before"),
        (new.keys() - old.keys() - not_before.keys(), "after"),
    )
    caveats += [f"only {where}: {size} {name}" for keys, where in only for size, name in sorted(keys)]
    caveats += [
        f"refused after: {' '.join(key)}: {why}" for key, why in not_after.items() if key in old.keys() - not_before
    ]
    both = [key for key in old if key in new]
    if few := [" ".join(key) for key in both if min(len(samples_of(rows[key])) for rows in (old, new)) < FEW]:
        caveats.append(f"times are not judged, for which {FEW} samples a side are needed: {'; '.join(few)}")
    changes = [end for key in {**old, **new} for end in ends(key, old, new, not_before, not_after)]
    changes += [change for key in both for change in changes_of(old[key], new[key])]
    return Comparison(tuple(changes), tuple(caveats))


def refusals(record: dict[str, Any]) -> Reasons:
    """Why contenders did not run, or not to the end, by size and name."""
    return {(size, name): why for size, whys in record.get("refused", {}).items() for name, why in whys.items()}


def ends(key: Key, old: Rows, new: Rows, not_before: Reasons, not_after: Reasons) -> Iterator[Change]:
    """The pictures that contender ``key`` finished, where it ran to the end on one side and was refused on the other."""
    if (key in not_before) == (key in not_after) or key not in (new if key in not_before else old):
        return
    ended, other, verdict = (new, old, "better") if key in not_before else (old, new, "worse")
    limit = other.get(key, {}).get("limit")
    if limit is not None and limit <= ended[key]["slowest"]:  # it would have been stopped on the other side too
        verdict = ""
    yield Change(*key, "pictures", pictures(old.get(key)), pictures(new.get(key)), verdict)


def pictures(row: dict[str, Any] | None) -> int:
    """How many a contender finished."""
    return 0 if row is None else len(samples_of(row)) - (row.get("limit") is not None)


def changes_of(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """The figures of one contender that both results have."""

    def change(figure: str, verdict: str) -> Change:
        return Change(old["size"], old["name"], figure, old[figure], new[figure], verdict)

    if old.get("ratios") and new.get("ratios"):
        yield change("seconds", "")
        yield change("ratio", time_verdict(old, new, old["ratios"], new["ratios"], "ratio", more_is_better=True))
    else:
        yield change(
            "seconds", time_verdict(old, new, samples_of(old), samples_of(new), "seconds", more_is_better=False)
        )
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
    if min(len(before), len(after)) < FEW:
        return ""
    above, below = min(after) > max(before), max(after) < min(before)
    if not (above or below) or abs(new[figure] / old[figure] - 1) < TIME:
        return ""
    verdict, bound = ("better", new) if above == more_is_better else ("worse", old)
    return "" if bound.get("limit") else verdict
