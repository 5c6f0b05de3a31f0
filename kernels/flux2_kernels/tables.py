"""The kept launch configurations and the order of preference among implementations, one JSON file per SM.

They live in ``tuned/`` and are written by ``scripts/gpu.py --tune`` on a card of that SM, so that first use tunes nothing.
A file of which no card has measured anything yet says so: its ``measured_on`` is null.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .constraint import Format, name_of

FOLDER = Path(__file__).parent / "tuned"

Config = Mapping[str, Any]

_imposed: dict[str, Config] = {}


@functools.cache
def kept_sms() -> tuple[int, ...]:
    """The SMs that have a file, ascending."""
    return tuple(sorted(int(path.stem.removeprefix("sm_")) for path in FOLDER.glob("sm_*.json")))


def nearest(sm: int) -> int:
    """The SM whose table serves ``sm``: the largest kept one not above it, or the smallest kept one."""
    return max((kept for kept in kept_sms() if kept <= sm), default=kept_sms()[0])


@functools.cache
def table(sm: int) -> dict[str, Any]:
    """The file that serves ``sm``, parsed."""
    parsed: dict[str, Any] = json.loads((FOLDER / f"sm_{nearest(sm)}.json").read_text())
    return parsed


def _fits(entry: Config, dims: Mapping[str, int]) -> bool:
    equal, at_most = entry.get("equal", {}), entry.get("at_most", {})
    return all(dims.get(k) == v for k, v in equal.items()) and all(
        k in dims and dims[k] <= v for k, v in at_most.items()
    )


@functools.lru_cache(maxsize=4096)
def _config(sm: int, kernel: str, dims: tuple[tuple[str, int], ...]) -> Config:
    for entry in table(sm)["configs"][kernel]:
        if _fits(entry, dict(dims)):
            return {k: v for k, v in entry.items() if k not in ("equal", "at_most")}
    raise KeyError(f"sm_{nearest(sm)}.json has no configuration of {kernel} for {dict(dims)}")


def config_of(sm: int, kernel: str, **dims: int) -> Config:
    """The configuration of ``kernel`` for a problem: of its entries, the first whose conditions hold.

    An entry's ``equal`` names dimensions that must match, ``at_most`` dimensions that must not exceed a value; ``size`` is
    the bytes of an element.
    """
    return _imposed.get(kernel) or _config(sm, kernel, tuple(sorted(dims.items())))


@contextmanager
def imposed(kernel: str, config: Config) -> Iterator[None]:
    """Launch ``kernel`` with ``config``, whatever the tables say; for tests and the tuner."""
    before = dict(_imposed)
    _imposed[kernel] = config
    try:
        yield
    finally:
        _imposed.clear()
        _imposed.update(before)


def order_of(sm: int, op: str, form: Format, default: Sequence[str]) -> list[str]:
    """Implementations of ``op`` from most to least wanted on ``sm``; the ones the table leaves out follow in order."""
    name = name_of(form.quantized or form.dtype)
    kept = table(sm)["order"].get(op, {}).get(name, []) if sm else []
    first = [i for i in kept if i in default]
    return first + [i for i in default if i not in first]


def forget() -> None:
    """Read the files again at the next question; for the tuner, which has just written one."""
    for cached in (kept_sms, table, _config):
        cached.cache_clear()
