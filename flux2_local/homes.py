"""Where weights that leave the device wait: in host memory as far as it goes, the rest in the files that they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import costs
from .footprint import Weights
from .offload.link import STAGES


@dataclass(frozen=True)
class Traveller:
    """A network that is not on the device all the time.

    Attributes:
        held: its weights.
        streams: whether it comes block by block.
        stay: of its blocks, those that come once a use.
        filed: whether its weights can be left to files; else they are in host memory, whether or not there is room.
    """

    held: Weights
    streams: bool
    stay: tuple[int, ...] = ()
    filed: bool = True

    @property
    def least(self) -> int:
        """Bytes of host memory that it cannot do without."""
        return STAGES * max(self.held.blocks) + self.held.hosted if self.streams else 0


@dataclass(frozen=True)
class Home:
    """Where a network's weights wait.

    Attributes:
        mapped: numbers of the blocks that come from their files.
        whole: whether all of it waits in host memory, beside the blocks what is outside of them.
        size: bytes of host memory, the buffers that files' blocks pass through included.
    """

    mapped: tuple[int, ...]
    whole: bool
    size: int


def homes(travellers: Mapping[str, Traveller], room: int) -> dict[str, Home]:
    """A home for each network in ``room`` bytes of host memory, those named first served first.

    Of a network for which there is too little room, the blocks that come in every step have it before those that come once a use;
    those of them that are left to their files are spread evenly, so that the disk is busy all the time.
    """
    found: dict[str, Home] = {}
    for name, one in travellers.items():
        others = sum(t.least for n, t in travellers.items() if n not in found and n != name)
        mine = room - others
        if one.held.total <= mine or not one.filed:
            found[name] = Home((), True, one.held.total)
        elif one.streams:
            found[name] = shared(one, max(0, mine - one.least))
        else:
            found[name] = Home((), False, 0)
        room -= found[name].size
    return found


def shared(one: Traveller, room: int) -> Home:
    """A home of which only ``room`` bytes are for blocks."""
    sizes, stay = one.held.blocks, set(one.stay)
    moving = [number for number in range(len(sizes)) if number not in stay]
    tried = ([moving[i] for i in chosen] for chosen in costs.staying(tuple(sizes[n] for n in moving)))
    pinned = set(next((some for some in tried if sum(sizes[n] for n in some) <= room), ()))
    room -= sum(sizes[n] for n in pinned)
    for number in [*moving, *one.stay]:
        if number not in pinned and sizes[number] <= room:
            pinned.add(number)
            room -= sizes[number]
    mapped = tuple(number for number in range(len(sizes)) if number not in pinned)
    return Home(mapped, False, one.least + sum(sizes[n] for n in pinned))
