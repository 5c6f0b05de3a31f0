"""Writing files whole or not at all, and refusing early where it cannot work."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError
from .presets import show_bytes


def home(path: str | Path) -> Path:
    """``path`` with a leading ~ replaced. Where there is no such user it stays as it is, and is a file's name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's own raises there


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: ``name`` below ``XDG_CACHE_HOME``, else below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flux2-local" / name


def check_folder(folder: Path, need: int, option: str = "-o") -> None:
    """Make ``folder`` and make sure that ``need`` bytes can be written there; ``option`` names another one.

    Raises:
        OutputError: it cannot be made or written, or the disk is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{folder} is no folder: a file has that name. Name another one with {option}.") from error
    except (OSError, ValueError) as error:
        raise OutputError(
            f"Nothing can be written to {folder}: {reason(error)}. Name another one with {option}."
        ) from error
    check_room(folder, need, option)


def check_room(folder: Path, need: int, option: str) -> None:
    """Make sure that the disk of ``folder`` has room for ``need`` bytes.

    Raises:
        OutputError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"The disk of {folder} has {show_bytes(free)} left and about {show_bytes(need)} are needed. Free some room, or "
            f"name another folder with {option}."
        )


def write(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path``: a temporary file beside it, then a rename.

    Raises:
        OutputError: it could not be written; nothing is left behind.
    """
    with replacing(path) as part:
        part.write_bytes(data)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` to write to; it becomes ``path`` when the context is left, or goes with its error.

    Raises:
        OutputError: it could not be written; nothing is left behind.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.{secrets.token_hex(4)}.part").open("xb") as made:
            part = Path(made.name)
        yield part
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}.") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power loss, where the system lets a program ask for it."""
    if os.name == "nt":  # a folder cannot be opened there; its journal keeps the order
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, … that does not exist."""
    number, candidate = 2, path
    while candidate.exists():
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate


def reason(error: BaseException) -> str:
    """The operating system's words for an error, without its number."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
