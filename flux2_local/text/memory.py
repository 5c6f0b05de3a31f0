"""Prompts encoded once: a text encoder that remembers what it gave, for as long as many requests are worked through."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..load import Components

ROOM = 256 * 2**20
"""Bytes of host memory for embeddings: some sixteen prompts of FLUX.2 [dev]."""


class Memory:
    """Stands in for a language model: the same tokens give the same tensor, from memory the second time.

    The embeddings are kept on the host, so that they take nothing from the device, and come back bit for bit.

    Attributes:
        encoded: how often the model itself had to work.
    """

    def __init__(self, components: Components, room: int = ROOM) -> None:
        self.plain, self.room, self.held, self.encoded = components, room, 0, 0
        self.known: OrderedDict[tuple[bytes, bytes], Tensor] = OrderedDict()

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        key = ids.cpu().numpy().tobytes(), mask.cpu().numpy().tobytes()
        if key in self.known:
            self.known.move_to_end(key)
            return self.known[key].to(ids.device)
        with self.plain.hold_text_encoder():
            embedded = self.plain.text_encoder(ids, mask)
        self.encoded += 1
        self.known[key] = embedded.cpu()
        self.held += embedded.nbytes
        while self.held > self.room and len(self.known) > 1:
            self.held -= self.known.popitem(last=False)[1].nbytes
        return embedded

    def __enter__(self) -> None:
        """Take the place of ``hold_text_encoder``: weights are moved only when they have to work."""

    def __exit__(self, *error: object) -> None:
        pass


def remembering(components: Components) -> Components:
    """``components`` with a text encoder that remembers; themselves, where it does already."""
    if isinstance(components.text_encoder, Memory):
        return components
    memory: Any = Memory(components)
    return replace(components, text_encoder=memory, hold_text_encoder=lambda: memory)


def forgetting(components: Components) -> Components:
    """The components that :func:`remembering` was given."""
    encoder: Any = components.text_encoder
    return encoder.plain if isinstance(encoder, Memory) else components
