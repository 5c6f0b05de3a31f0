"""The manifest: one line of JSON per finished picture, written after the picture and never before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import OutputError

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What is remembered of a manifest line while a batch runs.

    Attributes:
        file_name: of the picture.
        request: digest of what it was made from.
        size: bytes of the picture.
        shard, end: the tar file that holds it and where it ends there; "" and 0 for a file of its own.
    """

    file_name: str
    request: str
    size: int
    shard: str = ""
    end: int = 0


def read(path: Path) -> Iterator[Record]:
    """The finished pictures of a manifest; a torn or damaged line is passed over.

    Raises:
        OutputError: it cannot be read.
    """
    return (record for _, record in lines(path) if record is not None)


def lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Every line as it is, and what it says, or None where it is torn or damaged."""
    try:
        with path.open("rb") as f:
            for line in f:
                yield line, parse(line)
    except OSError as error:
        raise OutputError(f"The manifest {path} cannot be read: {files.reason(error)}.") from error


def parse(line: bytes) -> Record | None:
    """A line's record, if it is whole."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"line", "picture", "file_name", "bytes"} <= record.keys() else None


def entry(record: Record) -> Entry:
    return Entry(
        record["file_name"], record.get("request", ""), record["bytes"], record.get("shard", ""), record.get("end", 0)
    )


class Manifest:
    """An open manifest; a context manager.

    Attributes:
        done: the finished pictures by line and number.
        dropped: lines that were there and do not count: torn, damaged, doubled, or without their picture.
    """

    def __init__(self, path: Path, intact: Callable[[Entry], bool], anew: bool = False) -> None:
        """Open or begin a manifest, keeping the lines whose picture is ``intact``; with ``anew`` they are not read, and stay until
        :meth:`clear`.

        Raises:
            OutputError: it cannot be read or written.
        """
        self.path = path
        self.done: dict[tuple[int, int], Entry] = {}
        self.dropped = 0
        if path.exists() and not anew:
            self._load(intact)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            files.sync_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {files.reason(error)}.") from error

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def _load(self, intact: Callable[[Entry], bool]) -> None:
        for _, record in lines(self.path):
            key = (record["line"], record["picture"]) if record is not None else None
            if record is None or key is None or key in self.done or not intact(entry(record)):
                self.dropped += 1
            else:
                self.done[key] = entry(record)
        if self.dropped:
            self._rewrite()

    def _rewrite(self) -> None:
        """Write the manifest again with the first line of every picture that counts; whole or not at all."""
        left = dict(self.done)
        with files.replacing(self.path) as part, part.open("wb") as f:
            for line, record in lines(self.path):
                if record is None:
                    continue
                key = record["line"], record["picture"]
                if key in left and left[key] == entry(record):
                    del left[key]
                    f.write(line)

    def clear(self) -> None:
        """Remove every line.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            os.ftruncate(self._handle, 0)
            os.fsync(self._handle)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {files.reason(error)}.") from error
        self.done.clear()

    def append(self, record: Record) -> None:
        """Add a finished picture; when this returns it lasts.

        Raises:
            OutputError: it could not be written; the manifest is as before.
        """
        data = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        before = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            write_all(self._handle, data)
        except OSError as error:
            os.ftruncate(self._handle, before)
            raise OutputError(f"{self.path} cannot be written: {files.reason(error)}.") from error
        self.done[record["line"], record["picture"]] = entry(record)


def write_all(handle: int, data: bytes) -> None:
    """Write all of ``data`` and wait until it lasts."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


def to_parquet(manifest: Path, target: Path) -> Path:
    """The manifest as a Parquet file.

    Raises:
        BackendUnavailableError: pyarrow is not installed.
        OutputError: it cannot be written.
    """
    parquet = require_parquet()
    import pyarrow as arrow

    table = arrow.Table.from_pylist(sorted(read(manifest), key=lambda r: (r["line"], r["picture"])))
    with files.replacing(target) as part:
        parquet.write_table(table, part)
    return target


def require_parquet() -> Any:
    """pyarrow's Parquet module.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    from ..errors import BackendUnavailableError

    try:
        from pyarrow import parquet
    except ImportError as error:
        raise BackendUnavailableError(
            "A Parquet manifest needs pyarrow, which is not installed: pip install 'flux2-local[parquet]'."
        ) from error
    return parquet
