"""Reading prompts: JSONL, CSV or plain text, from a file or standard input. A bad line is a value, not an exception."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import reason
from ..request import Request, parse_size

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "text"}
BROKEN = "\udc80", "\udcff"
"""The characters that undecodable bytes are read as."""


@dataclass(frozen=True)
class Line:
    """One line of the input: its number, from 1, and the fields that it names."""

    number: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """One line that cannot be used, and why."""

    number: int
    reason: str


def read(source: Path, form: str | None = None) -> Iterator[Line | BadLine]:
    """The lines of a file, or of standard input where ``source`` is ``-``. Blank lines are passed over.

    Args:
        source: the file.
        form: "jsonl", "csv" or "text"; by the file's ending where None, else by its first character.

    Raises:
        RequestError: the file cannot be read, the format is unknown, or a CSV's first row does not name fields.
    """
    if form is not None and form not in FORMATS.values():
        raise RequestError(f"--input-format must be one of jsonl, csv, text; {form!r} was given.")
    try:
        data = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
    except OSError as error:
        raise RequestError(f"The prompts in {source} cannot be read: {reason(error)}.") from error
    text = data.decode("utf-8-sig", "surrogateescape")
    form = form or FORMATS.get(source.suffix.lower()) or ("jsonl" if text.lstrip().startswith("{") else "text")
    if form == "csv":
        return read_csv(text)
    return (parse(number, line, form) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def parse(number: int, text: str, form: str) -> Line | BadLine:
    """One line of JSON, where null leaves its field out, or of plain text."""
    if is_broken(text):
        return BadLine(number, "it is not UTF-8")
    if form == "text":
        return Line(number, {"prompt": text.strip()})
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadLine(number, f"it is not JSON: {error}")
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return BadLine(number, 'it must be an object such as {"prompt": "a fox", "seed": 7}, or a prompt in quotes')
    return Line(number, sized({name: given for name, given in value.items() if given is not None}))


def read_csv(text: str) -> Iterator[Line | BadLine]:
    """Rows of a CSV whose first row names fields; an empty cell leaves its field out.

    Raises:
        RequestError: the first row names something else.
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise RequestError(f"The CSV's first row cannot be read: {error}.") from error
    if wrong := [name for name in names if name not in Request.model_fields]:
        known = ", ".join(Request.model_fields)
        raise RequestError(f"The CSV's first row must name fields; {wrong[0]!r} is none of {known}.")
    if len(set(names)) < len(names):
        raise RequestError("The CSV's first row names a field twice.")
    return csv_lines(rows, names)


def csv_lines(rows: Any, names: list[str]) -> Iterator[Line | BadLine]:
    """The rows after the first, numbered by the line that each begins on."""
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(number, f"it is not CSV: {error}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(names):
            yield BadLine(number, f"it has {len(cells)} cells, the first row {len(names)}")
        elif any(is_broken(cell) for cell in cells):
            yield BadLine(number, "it is not UTF-8")
        else:
            fields: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
            if "images" in fields:
                fields["images"] = [part.strip() for part in fields["images"].split("|")]
            yield Line(number, sized(fields))


def sized(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with an ``image_size`` such as "768x512" as width and height."""
    size = fields.get("image_size")
    return {**fields, "image_size": parse_size(size)} if isinstance(size, str) else fields


def is_broken(text: str) -> bool:
    """Whether ``text`` was decoded from bytes that are not UTF-8."""
    return any(BROKEN[0] <= c <= BROKEN[1] for c in text)
