"""Pictures for training, drawn once by worker processes and kept as one memory-mapped array."""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from .render import render
from .scenes import random_scene

CROP = 256
HELD_OUT_SEED = 10_000_000
"""The model is never trained on scenes that are drawn from seeds at and above this."""


def draw_crops(task: tuple[int, int]) -> np.ndarray:
    """Four crops of one new picture of a random size from 512² to 1024²."""
    seed, crop = task
    rng = random.Random(seed)
    scene = random_scene(rng, signs=0.5)
    width, height = rng.choice(((512, 512), (512, 512), (768, 768), (1024, 768), (576, 1024), (1024, 1024)))
    pixels = np.asarray(render(scene, width, height))
    out = []
    for _ in range(4):
        x, y = rng.randrange(width - crop + 1), rng.randrange(height - crop + 1)
        out.append(pixels[y : y + crop, x : x + crop])
    return np.stack(out)


def crops(path: Path, pictures: int, seed: int) -> np.ndarray:
    """A memory-mapped uint8 array [4·pictures, CROP, CROP, 3]; drawn if it is not there yet."""
    if path.exists():
        return np.load(path, mmap_mode="r")
    part = path.with_suffix(".part")
    array = open_memmap(part, mode="w+", dtype=np.uint8, shape=(4 * pictures, CROP, CROP, 3))
    tasks = [(seed + i, CROP) for i in range(pictures)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, four in enumerate(pool.map(draw_crops, tasks, chunksize=16)):
            array[4 * i : 4 * i + 4] = four
    array.flush()
    part.replace(path)
    return np.load(path, mmap_mode="r")
