"""What a batch is to make: lines times a sweep, as pictures in a fixed order with fixed names and seeds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import home
from ..images import SUFFIXES, scheme_of
from ..request import MAX_SEED, Request, Variant, derive_seed, make_request
from .lines import BadLine, Line, sized


@dataclass(frozen=True)
class Sweep:
    """What is done with every line.

    Attributes:
        variant: that requests are checked for.
        defaults: fields of lines that do not name them.
        grid: per field the values to try; every combination is made of every line.
        repeat: pictures per line and combination, with consecutive seeds.
        job_seed: where the seeds of lines without one come from.
    """

    variant: Variant = "standard"
    defaults: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    repeat: int = 1
    job_seed: int = 0

    def requests(self, line: Line) -> Iterator[tuple[Request, int]]:
        """One request per combination, of one picture and with a seed, and how many pictures it stands for.

        Raises:
            RequestError: the line does not make a request.
        """
        if twice := [name for name in self.grid if name in line.fields]:
            raise RequestError(f"{twice[0]} is given by the line and by the grid too; leave it out of one of them.")
        for number, values in enumerate(product(*self.grid.values())):
            fields = {**self.defaults, **line.fields, **dict(zip(self.grid, values, strict=True))}
            request = make_request(self.variant, fields)
            if request.sync_mode:
                raise RequestError("sync_mode keeps nothing on the disk, and a batch keeps its pictures; leave it out.")
            count = self.repeat * request.num_images
            seed = derive_seed(self.job_seed, line.number, number) if request.seed is None else request.seed
            if seed + count - 1 > MAX_SEED:
                raise RequestError(f"seed: {count} pictures from {seed} on go beyond the largest seed, {MAX_SEED}.")
            yield request.model_copy(update={"seed": seed, "num_images": 1}), count


@dataclass(frozen=True)
class Picture:
    """One picture of a job.

    Attributes:
        line: number of its line.
        number: which of the line's pictures, from 0.
        place: which of the job's pictures, from 0.
        request: what it is made from, seed included.
    """

    line: int
    number: int
    place: int
    request: Request

    @property
    def key(self) -> str:
        """Its name without the ending: line, number and the prompt's first words. Unique in the job."""
        from ..stages import slug

        return f"{self.line:06d}-{self.number:03d}-{slug(self.request.prompt)}"

    @property
    def file_name(self) -> str:
        return self.key + SUFFIXES[self.request.output_format]

    @property
    def digest(self) -> str:
        """The same for the same request, and for no other."""
        fields = json.dumps(self.request.model_dump(), sort_keys=True, default=str)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """Checked lines and what to do with them.

    Attributes:
        lines: those that make requests.
        bad: the others.
        count: pictures in all.
    """

    sweep: Sweep
    lines: tuple[Line, ...]
    bad: tuple[BadLine, ...]
    count: int

    def pictures(self) -> Iterator[Picture]:
        """All pictures, in order; made as they are asked for, so that a million of them take no room."""
        place = 0
        for line in self.lines:
            number = 0
            for request, count in self.sweep.requests(line):
                seed = request.seed or 0
                for step in range(count):
                    yield Picture(line.number, number, place, request.model_copy(update={"seed": seed + step}))
                    number, place = number + 1, place + 1


def make_job(lines: Iterable[Line | BadLine], sweep: Sweep) -> Job:
    """Check every line, before anything is generated.

    Raises:
        RequestError: the sweep itself is wrong.
    """
    if sweep.repeat < 1:
        raise RequestError(f"--repeat must be at least 1; {sweep.repeat} was given.")
    if not 0 <= sweep.job_seed <= MAX_SEED:
        raise RequestError(f"--job-seed must be from 0 to {MAX_SEED}; {sweep.job_seed} was given.")
    good: list[Line] = []
    bad: list[BadLine] = []
    count = 0
    for line in lines:
        if isinstance(line, BadLine):
            bad.append(line)
            continue
        try:
            requests = list(sweep.requests(line))
            check_references(requests[0][0])
        except RequestError as error:
            bad.append(BadLine(line.number, str(error)))
            continue
        good.append(line)
        count += sum(n for _, n in requests)
    return Job(sweep, tuple(good), tuple(bad), count)


def check_references(request: Request) -> None:
    """Make sure that reference pictures on this machine are there, and that addresses of others are some.

    Raises:
        RequestError: naming one that is not.
    """
    for source in request.images:
        if not isinstance(source, (str, Path)):
            raise RequestError(f"images: a reference picture is a path or a URL; {source!r} was given.")
        if not scheme_of(source) and not os.path.isfile(home(source)):  # noqa: PTH113  # Path's raises for too long a name
            raise RequestError(f"images: there is no picture {source}.")


def parse_grid(texts: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """FIELD=VALUE,VALUE,… repeated, as values per field.

    Raises:
        RequestError: one is not of that form, or its field is not one that a grid can vary.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in Request.model_fields or name in ("images", "prompt", "sync_mode"):
            raise RequestError(f"--grid takes FIELD=VALUE,VALUE such as guidance_scale=2,3.5; {text!r} is not that.")
        if name in grid:
            raise RequestError(f"--grid names {name} twice; give all of its values in one.")
        found = [value.strip() for value in values.split(",") if value.strip()]
        if not found or len(set(found)) < len(found):
            raise RequestError(f"--grid {name} needs values, each once; {values!r} was given.")
        grid[name] = tuple(sized({name: value})[name] for value in found)
    return grid


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "1,2,10-19" -> those numbers.

    Raises:
        RequestError: it is not of that form.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise RequestError(f"--seeds takes numbers and ranges such as 1,2,10-19; {text!r} is not that.")
        if dash and int(last) - int(first) >= 1_000_000:
            raise RequestError(f"--seeds {part.strip()} names more than a million seeds.")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        raise RequestError(f"--seeds names a seed twice: {text}.")
    return tuple(seeds)
