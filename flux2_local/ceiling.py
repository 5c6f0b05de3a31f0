"""The ceiling of the device memory that this process takes while a pipeline with a budget works.

torch refuses what is beyond it as it refuses what the card has not, so that a plan that was too low ends as one that ran out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .hardware import Hardware


@dataclass
class _Card:
    """One card of this process.

    Attributes:
        working: ceilings of the pipelines that are at work on it.
        fraction, taken: torch's limit and the bytes that tensors took when the first of them began.
        failed: where the last use ended with an error, whose it was and the bytes that tensors took when it began.
    """

    working: list[Ceiling]
    fraction: float = 1.0
    taken: int = 0
    failed: tuple[Ceiling, int] | None = None


_CARDS: dict[str, _Card] = {}
_TURN = threading.Lock()


class Ceiling:
    """One pipeline's; entered around all that it does on the device. Other pipelines' tensors are not counted.

    Args:
        hardware: the device; ceilings are for CUDA's alone.
        room: bytes that its tensors may take, or None for what there is.

    Attributes:
        own: bytes that it has on the device between two uses.
    """

    def __init__(self, hardware: Hardware, room: int | None) -> None:
        self.device = hardware.device if hardware.kind == "cuda" and not hardware.described else None
        self.room, self.own = room, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Nothing beyond it is given out inside; afterwards torch's limit is what it was."""
        if self.device is None:
            yield
            return
        import torch

        with _TURN:
            card = _CARDS.setdefault(self.device, _Card([]))
            before = torch.cuda.memory_allocated(self.device)
            if not card.working:
                if card.failed is not None:  # not sooner: the error's traceback held what it was working on
                    one, began = card.failed
                    one.own += before - began
                    card.failed = None
                card.fraction, card.taken = torch.cuda.get_per_process_memory_fraction(self.device), before
            card.working.append(self)
            limit(card, self.device)
        failed = True
        try:
            yield
            failed = False
        finally:
            with _TURN:
                if card.working == [self] and failed:
                    card.failed = self, before
                elif card.working == [self]:
                    self.own += torch.cuda.memory_allocated(self.device) - before
                card.working.remove(self)
                limit(card, self.device)


def limit(card: _Card, device: str) -> None:
    """Hold torch to what the pipelines at work may take together; to what it was held to before, where one of them is free."""
    import torch

    rooms = [ceiling.room for ceiling in card.working if ceiling.room is not None]
    fraction = card.fraction
    if rooms and len(rooms) == len(card.working):
        others = max(0, card.taken - sum(ceiling.own for ceiling in card.working))
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(fraction, max(0, sum(rooms) + others) / total)
    if fraction != torch.cuda.get_per_process_memory_fraction(device):
        torch.cuda.set_per_process_memory_fraction(fraction, device)
