"""The one folder that files are served from: names nobody can guess, and no way out of it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from .. import files, images

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(?:png|jpg|webp)")

BEGINNINGS = {b"\x89P": "png", b"\xff\xd8": "jpeg", b"RI": "webp"}
"""The first two bytes of each format."""


class Pictures:
    """Pictures by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a picture lies.

        Raises:
            KeyError: the name is not one of ours.
        """
        if not NAME.fullmatch(name):
            raise KeyError(name)
        return self.folder / name

    def kind(self, name: str) -> str:
        """Content type of a picture, by its beginning: an uploaded one may be other than its sender called it.

        Raises:
            KeyError: the name is not one of ours.
            OSError: there is no such file.
        """
        with self.path(name).open("rb") as file:
            head = file.read(2)
        return images.CONTENT_TYPES[BEGINNINGS[head]]

    def add(self, data: bytes, form: str) -> str:
        """Write a picture; returns its name."""
        name = secrets.token_urlsafe(24) + images.SUFFIXES[form]
        self.write(name, data)
        return name

    def write(self, name: str, data: bytes) -> None:
        """Write a picture under a name.

        Raises:
            OutputError: it cannot be written.
        """
        files.write(self.path(name), data)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def sweep(self, owned: set[str]) -> None:
        """Remove what no request owns: leftovers of a server that was stopped in the middle of writing."""
        for path in self.folder.iterdir():
            if path.name not in owned and path.is_file():
                path.unlink(missing_ok=True)
