"""Freed host memory, which the C library hands back to the system at once where a block was large.

What a step or the decoder computes next is then mapped and cleared anew, page by page. Kept by the process it is there already, as
torch keeps a card's memory.
"""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hardware import Hardware

KEPT = 2**30
"""Bytes that the process keeps free at most at the end of its heap, and the size from which a block is mapped by itself."""

FIRST = (2, 35)
"""The first glibc in which that size may be above 32 MiB (its bug 28500)."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from glibc's malloc.h."""


def reason_against(hardware: Hardware) -> str | None:
    """Why freed memory cannot be kept there, or None if it can."""
    if hardware.kind != "cpu":
        return "the networks' memory is the device's, which torch keeps"
    name, version = platform.libc_ver()
    if hardware.described or (name == "glibc" and tuple(map(int, version.split(".")[:2])) >= FIRST):
        return None
    return f"it takes glibc {'.'.join(map(str, FIRST))} or newer"


def keep() -> None:
    """Have this process keep what it frees, up to :data:`KEPT`, from now on."""
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(parameter, KEPT)
