"""Latents as the transformer sees them: noise, packing into tokens, positions."""

from __future__ import annotations

import torch
from torch import Tensor

REFERENCE_TIME = 10
"""Reference picture i sits at time 10 + 10·i; the picture itself at 0."""


def noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """The starting noise of one picture, float32 [1, channels, height, width], drawn on the CPU on every device.

    Drawn in float32 and cast later: torch draws the same numbers for its 16-bit types, so this is what the pipelines draw.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, height, width, generator=generator)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> tokens [B, h·w, C]."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h * w).permute(0, 2, 1)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, h·w, C] -> [B, C, h, w]."""
    return tokens.permute(0, 2, 1).unflatten(2, (height, width)).contiguous()


def text_positions(length: int) -> Tensor:
    """Positions (0, 0, 0, l) of a prompt's tokens, int64 [length, 4]."""
    ids = torch.zeros(length, 4, dtype=torch.long)
    ids[:, 3] = torch.arange(length)
    return ids


def image_positions(height: int, width: int, time: int = 0) -> Tensor:
    """Positions (time, row, column, 0) of a picture's tokens, int64 [height·width, 4]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    flat = [torch.full((height * width,), time), rows.flatten(), columns.flatten()]
    return torch.stack([*flat, torch.zeros(height * width, dtype=torch.long)], -1)


def reference_positions(sizes: list[tuple[int, int]]) -> Tensor:
    """Positions of all reference pictures' tokens, in order, given their (height, width) in tokens."""
    if not sizes:
        return torch.zeros(0, 4, dtype=torch.long)
    return torch.cat([image_positions(h, w, REFERENCE_TIME * (i + 1)) for i, (h, w) in enumerate(sizes)])
