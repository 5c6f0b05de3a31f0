"""Prompts' embeddings on disk, for whoever asks for it: the same prompt to the same text encoder is not encoded again.

A file's name is a digest of all that its content follows from, the prompt's tokens among it, and holds the embedding alone: no
prompt can be read there. Whoever has the folder can still test whether a prompt that he guesses is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError
from ..files import cache_folder, reason, replacing

LAYOUT = 1
"""Of the kept files; changes when what is in them does."""

ROOM = 2**30
"""Bytes on disk: some sixty prompts of FLUX.2 [dev]."""


def folder() -> Path:
    """Where embeddings are kept."""
    return cache_folder("prompts")


@dataclass(frozen=True)
class KeptPrompts:
    """The embeddings that one text encoder has made.

    Attributes:
        encoder: all that an embedding follows from beside its tokens, as JSON.
        dtype: of the embeddings.
        room: bytes on disk that files of all text encoders may take; those unused for longest go.
        told: what happened that the user should know.
    """

    encoder: str
    dtype: torch.dtype
    room: int = ROOM
    told: list[str] = field(default_factory=list)

    def path(self, ids: Tensor, mask: Tensor) -> Path:
        """The file for tokens and their mask, int64 [B, T] each."""
        digest = hashlib.sha256(json.dumps([LAYOUT, str(self.dtype), self.encoder, list(ids.shape)]).encode())
        for part in (ids, mask):
            digest.update(part.cpu().numpy().tobytes())
        return folder() / f"{digest.hexdigest()}.safetensors"

    def read(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """The embedding [B, T, joint] on the host, or None where it is not there or damaged."""
        path = self.path(ids, mask)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                embedded, expected = f.get_tensor("embedding").clone(), (f.metadata() or {}).get("sha256")
            os.utime(path)  # the time of use, by which files go
            if embedded.dtype != self.dtype or embedded.shape[:2] != ids.shape or digest_of(embedded) != expected:
                raise ValueError("its content is not what was written")
        except (SafetensorError, OSError, ValueError) as error:
            self.told.append(f"A kept prompt's embedding could not be used ({reason(error)}); it was made again.")
            return None
        return embedded

    def write(self, ids: Tensor, mask: Tensor, embedded: Tensor) -> None:
        """Keep an embedding [B, T, joint]; where it cannot be written, the user is told."""
        path, whole = self.path(ids, mask), embedded.contiguous()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file({"embedding": whole}, part, {"sha256": digest_of(whole)})
        except (OutputError, OSError) as error:
            self.told.append(f"The prompt's embedding was not kept: {reason(error)}")
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        with suppress(OSError):
            files = {path: path.stat() for path in folder().glob("*.safetensors")}
            held = sum(facts.st_size for facts in files.values())
            for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
                if held <= self.room:
                    break
                if path != newest:
                    path.unlink()
                    held -= files[path].st_size


def digest_of(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(value.view(torch.uint8).numpy().data).hexdigest()
