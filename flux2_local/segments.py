"""The segments of device memory that torch takes on a card: whether they can grow, and what lies in them unused."""

from __future__ import annotations

import os
import sys

UNUSED = 160 * 2**20
"""Bytes of growing segments that lie unused at most: gaps, each smaller than the pages of 20 MiB that a segment grows by. Of replayed
steps (``tests/test_segments.py``) none had more than 128 MiB."""

SCATTERED = 0.2
"""What lies unused between tensors of segments that cannot grow, as a share of what is alive beside the weights: a gap is used again
only for what fits in it. Of replayed steps none had more."""


def unused(alive: int, growing: bool) -> int:
    """Bytes that torch has taken and cannot use, at most, with so many ``alive`` beside the weights."""
    return UNUSED if growing else UNUSED + int(SCATTERED * alive)


def grow(device: str) -> bool:
    """Let torch's segments grow from here on, if they can; whether they do.

    Settings of torch's allocator that the user has made (``PYTORCH_ALLOC_CONF``, ``PYTORCH_CUDA_ALLOC_CONF``) are left as they are.

    Args:
        device: a CUDA device, on which this is tried.
    """
    import torch

    own = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    if own is not None:
        return "expandable_segments:true" in own.lower().replace(" ", "")
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # there is no public one
    if sys.platform != "linux" or configure is None:
        return False
    configure("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:  # the driver cannot map memory piece by piece, as in some virtual machines
        configure("expandable_segments:False")
        return False
    return True
