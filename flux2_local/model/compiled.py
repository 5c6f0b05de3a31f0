"""torch.compile for the repeated blocks: two small graphs, one per kind of block, for every size of picture.

What is compiled is kept on disk, so that the next process traces but does not compile again. A mark beside it says what it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import cache_folder
from .transformer import Flux2Transformer, TransformerConfig

if TYPE_CHECKING:
    from ..hardware import Hardware


def reason_against(hardware: Hardware) -> str | None:
    """Why nothing can be compiled there, with how to get it where it can be got; None if it can."""
    if hardware.described:
        return None
    if hardware.kind == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl")
    ):
        return "there is no C++ compiler; install g++ or clang"
    if hardware.kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def mark(config: TransformerConfig, hardware: Hardware, *how: str) -> Path:
    """The file that is there when blocks like these were compiled before, for this device and by this torch.

    Args:
        config: the transformer's.
        hardware: the device that computes.
        how: it computes: its type, weights' format, operations and attention.
    """
    facts = [asdict(config), torch.__version__, hardware.name, *how]
    return cache_folder("compiled") / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.mark"


def compile_blocks(transformer: Flux2Transformer, folder: Path, backend: str = "inductor") -> None:
    """Compile every block's forward, which happens when it first runs.

    Args:
        transformer: changed in place. Its operations must be traceable: the reference's or Triton's.
        folder: where compiled code is kept, for the whole process; TORCHINDUCTOR_CACHE_DIR, where set, is used instead.
        backend: of torch.compile.
    """
    import torch.fx.experimental._config as shapes

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Otherwise a number of tokens that equals another dimension once is taken to equal it always.
    shapes.use_duck_shape = False
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True, fullgraph=True)
