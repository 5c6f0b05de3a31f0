"""Where the pictures go: files in a folder, a folder that Hugging Face ``datasets`` reads, or WebDataset shards."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .. import files
from ..errors import OutputError, RequestError
from .manifest import Entry, Record, read, write_all

if TYPE_CHECKING:
    from ..result import ImageFile
    from .job import Picture

LEFT_BEHIND = re.compile(
    r"^\.(\d{6,}-\d{3,}-.+|(manifest|metadata)\.jsonl|manifest\.parquet|batch\.json)(\.[^.]+)?\.part$"
)
"""Temporary files of a batch, as :func:`flux2_local.files.replacing` names them."""


class TakenError(Exception):
    """A file of that name is there and is not this batch's."""


class Store(Protocol):
    """One layout.

    Attributes:
        manifest: where this layout keeps its manifest.
    """

    manifest: Path

    def intact(self, entry: Entry) -> bool:
        """Whether the picture that a manifest line promises is there in full."""

    def clash(self, pictures: Iterable[Picture], resumed: bool = False) -> Path | None:
        """A file that is there and that one of ``pictures`` would be written to; with ``resumed``, one that an interrupted run of
        theirs cannot have left."""

    def begin(self, done: Iterable[Entry]) -> None:
        """Remove what an interrupted run left half-done."""

    def keep(self, picture: Picture, image: ImageFile, record: Record) -> Record:
        """Store a picture so that it lasts; the record, completed.

        Raises:
            TakenError: its place is taken by something else.
            OutputError: it cannot be written.
        """

    def end(self, done: Iterable[Entry]) -> None:
        """Complete what is only complete at the end; called however the run ended."""


class Folder:
    """A file per picture, with the manifest beside them."""

    def __init__(self, manifest: Path, overwrite: bool) -> None:
        self.folder, self.manifest, self.overwrite = manifest.parent, manifest, overwrite

    def intact(self, entry: Entry) -> bool:
        try:
            return (self.folder / entry.file_name).stat().st_size == entry.size
        except OSError:
            return False

    def clash(self, pictures: Iterable[Picture], resumed: bool = False) -> Path | None:
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        taken = ((self.folder / p.file_name, p) for p in pictures if p.file_name in there) if there else ()
        return next((path for path, p in taken if not (resumed and may_be_ours(path, p))), None)

    def begin(self, done: Iterable[Entry]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, picture: Picture, image: ImageFile, record: Record) -> Record:
        path = self.folder / picture.file_name
        if self.overwrite or not path.exists() or is_ours(path, image):
            files.write(path, image.data)
            files.sync_folder(self.folder)
        else:
            raise TakenError(f"{path} is there already and is not this batch's; move it, or say --overwrite")
        return record

    def end(self, done: Iterable[Entry]) -> None:
        pass


def is_ours(path: Path, image: ImageFile) -> bool:
    """Whether ``path`` is this picture from a run that was ended before its manifest line."""
    from ..images import read_settings

    try:
        return path.read_bytes() == image.data or read_settings(path) == image.settings
    except (OSError, RequestError):
        return False


def may_be_ours(path: Path, picture: Picture) -> bool:
    """Whether ``path`` can be what :func:`is_ours` will call this picture's once that is made."""
    from ..images import read_settings

    try:
        return read_settings(path).get("seed") == picture.request.seed
    except (OSError, RequestError):
        return False


class Shards:
    """WebDataset: plain tar files, per picture two members of one name, the picture and its record.

    Members are only ever appended, and what the manifest does not promise is cut off before the first is, so a shard is
    the same however often the run was interrupted. Shards get tar's end mark when the run ends.
    """

    END = bytes(2 * tarfile.BLOCKSIZE)

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.manifest = manifest_of("webdataset", folder)
        self.ends: dict[str, int] = {}

    def intact(self, entry: Entry) -> bool:
        try:
            return bool(entry.shard) and (self.folder / entry.shard).stat().st_size >= entry.end
        except OSError:
            return False

    def clash(self, pictures: Iterable[Picture], resumed: bool = False) -> Path | None:
        return None if resumed else next(self.folder.glob("shard-*.tar"), None)

    def begin(self, done: Iterable[Entry]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ends = ends(done)
        for path in self.folder.glob("shard-*.tar"):
            if path.name in self.ends:
                os.truncate(path, self.ends[path.name])
            else:
                path.unlink()

    def keep(self, picture: Picture, image: ImageFile, record: Record) -> Record:
        shard = f"shard-{picture.place // self.size:06d}.tar"
        start = self.ends.get(shard, 0)
        told = json.dumps(record, ensure_ascii=False).encode()
        data = member(picture.file_name, image.data) + member(f"{picture.key}.json", told)
        try:
            handle = os.open(self.folder / shard, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.ftruncate(handle, start)
                os.lseek(handle, start, os.SEEK_SET)
                write_all(handle, data)
            except BaseException:
                os.ftruncate(handle, start)
                raise
            finally:
                os.close(handle)
            if not start:
                files.sync_folder(self.folder)
        except OSError as error:
            raise OutputError(f"{self.folder / shard} cannot be written: {files.reason(error)}.") from error
        self.ends[shard] = start + len(data)
        return {**record, "shard": shard, "offset": start + tarfile.BLOCKSIZE, "end": self.ends[shard]}

    def end(self, done: Iterable[Entry]) -> None:
        for shard, end in ends(done).items():
            path = self.folder / shard
            with path.open("r+b") as f:
                f.truncate(end)
                f.seek(end)
                f.write(self.END)
                f.flush()
                os.fsync(f.fileno())


def ends(done: Iterable[Entry]) -> dict[str, int]:
    """Where the last finished picture of each shard ends."""
    found: dict[str, int] = {}
    for entry in done:
        found[entry.shard] = max(found.get(entry.shard, 0), entry.end)
    return found


def member(name: str, data: bytes) -> bytes:
    """A tar member that depends on nothing but its name and data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


LAYOUTS = ("files", "imagefolder", "webdataset")


def make_store(layout: str, folder: Path, shard_size: int = 1000, overwrite: bool = False) -> Store:
    """The store of a layout.

    Raises:
        RequestError: no such layout, or a shard of no pictures.
    """
    if layout not in LAYOUTS:
        raise RequestError(f"--layout must be one of {', '.join(LAYOUTS)}; {layout!r} was given.")
    if shard_size < 1:
        raise RequestError(f"--shard-size must be at least 1; {shard_size} was given.")
    if layout == "webdataset":
        return Shards(folder, shard_size)
    return Folder(manifest_of(layout, folder), overwrite)


def clear(folder: Path) -> None:
    """Remove the temporary files that a killed batch left in ``folder``."""
    for path in folder.glob(".*.part"):
        if LEFT_BEHIND.match(path.name):
            path.unlink(missing_ok=True)


def manifest_of(layout: str, folder: Path) -> Path:
    """Where a batch of this layout keeps its manifest."""
    return folder / "train" / "metadata.jsonl" if layout == "imagefolder" else folder / "manifest.jsonl"


def discard(manifest: Path) -> None:
    """Remove the files that a manifest names, if there is one.

    Raises:
        OutputError: one cannot be removed.
    """
    if not manifest.is_file():
        return
    for record in read(manifest):
        path = holder(manifest, record)
        try:
            if path.parent == manifest.parent:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be removed: {files.reason(error)}.") from error


def holder(manifest: Path, record: Record) -> Path:
    """The file that holds a finished picture: its own, or a shard."""
    return manifest.parent / str(record.get("shard", record["file_name"]))


def find_manifest(folder: Path) -> Path:
    """The manifest of a batch's folder, whatever its layout.

    Raises:
        OutputError: there is none.
    """
    for path in (folder / "manifest.jsonl", folder / "train" / "metadata.jsonl", folder / "metadata.jsonl"):
        if path.is_file():
            return path
    raise OutputError(f"{folder} holds no manifest.jsonl; name a folder that `flux2-local batch` wrote.")


def load_picture(manifest: Path, record: Record) -> io.BytesIO:
    """The bytes of a finished picture, from its file or its shard.

    Raises:
        OutputError: it is not there.
    """
    path = holder(manifest, record)
    try:
        with path.open("rb") as f:
            f.seek(record.get("offset", 0))
            return io.BytesIO(f.read(record["bytes"]))
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {files.reason(error)}.") from error
