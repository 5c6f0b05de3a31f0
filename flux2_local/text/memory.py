"""Prompts encoded once: a text encoder that remembers what it gave, for as long as many requests are worked through, or on disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..load import Components
    from .kept import KeptPrompts
    from .tokenizer import Tokens

ROOM = 256 * 2**20
"""Bytes of host memory for embeddings: some sixteen prompts of FLUX.2 [dev]."""


class Memory:
    """Stands in for a language model: the same tokens give the same tensor, from memory the second time.

    The embeddings are kept on the host, so that they take nothing from the device, and come back bit for bit.

    Attributes:
        encoder, hold: the model, and how to have it at hand.
        encoded: how often it had to work.
        kept: where embeddings are kept beyond the process, or None.
    """

    def __init__(self, components: Components, room: int = ROOM, kept: KeptPrompts | None = None) -> None:
        self.encoder, self.hold, self.device = components.text_encoder, components.hold_text_encoder, components.device
        self.room, self.held, self.encoded, self.kept = room, 0, 0, kept
        self.known: OrderedDict[tuple[bytes, bytes], Tensor] = OrderedDict()
        self.turn = threading.Lock()

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        key = key_of(ids, mask)
        with self.turn:
            if key not in self.known and not self._recall(ids, mask):
                with self.hold():
                    self._learn(ids, mask)
            self.known.move_to_end(key)
            return self.known[key].to(ids.device)

    @torch.inference_mode()
    def read(self, prompts: Iterable[Tokens]) -> None:
        """Encode what is not known yet, with the weights moved once for all of it."""
        with self.turn:
            new = {key_of(t.ids, t.mask): t for t in prompts if not self.knows([t]) and not self._recall(t.ids, t.mask)}
            if not new:
                return
            with self.hold():
                for tokens in new.values():
                    self._learn(tokens.ids.to(self.device), tokens.mask.to(self.device))

    def knows(self, prompts: Iterable[Tokens]) -> bool:
        """Whether none of them would have to be encoded."""
        return all(key_of(t.ids, t.mask) in self.known for t in prompts)

    def _learn(self, ids: Tensor, mask: Tensor) -> None:
        """Encode a prompt."""
        embedded = self.encoder(ids, mask).cpu()
        self.encoded += 1
        self._hold(ids, mask, embedded)
        if self.kept is not None:
            self.kept.write(ids, mask, embedded)

    def _recall(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether the embedding was on disk; it is known then."""
        embedded = None if self.kept is None else self.kept.read(ids, mask)
        if embedded is not None:
            self._hold(ids, mask, embedded)
        return embedded is not None

    def _hold(self, ids: Tensor, mask: Tensor, embedded: Tensor) -> None:
        """Let the oldest ones go where there is no room."""
        self.known[key_of(ids, mask)] = embedded
        self.held += embedded.nbytes
        while self.held > self.room and len(self.known) > 1:
            self.held -= self.known.popitem(last=False)[1].nbytes

    def __enter__(self) -> None:
        """Take the place of ``hold_text_encoder``: weights are moved only when they have to work."""

    def __exit__(self, *error: object) -> None:
        pass


def key_of(ids: Tensor, mask: Tensor) -> tuple[bytes, bytes]:
    """The same for the same tokens, and for no others."""
    return ids.cpu().numpy().tobytes(), mask.cpu().numpy().tobytes()


def remembering(components: Components, kept: KeptPrompts | None = None) -> Components:
    """``components`` with a text encoder that remembers, on disk too where ``kept`` says; themselves, where it does already."""
    if isinstance(components.text_encoder, Memory):
        return components
    memory: Any = Memory(components, kept=kept)
    return replace(components, text_encoder=memory, hold_text_encoder=lambda: memory)


def forgetting(components: Components) -> Components:
    """``components`` with the text encoder that :func:`remembering` was given."""
    memory: Any = components.text_encoder
    if not isinstance(memory, Memory):
        return components
    return replace(components, text_encoder=memory.encoder, hold_text_encoder=memory.hold)
