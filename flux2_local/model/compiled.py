"""torch.compile for the repeated blocks: small graphs that every size of picture shares.

There is one for each kind of block; others where a block's weights or its next one's have another format, where more than one
picture is denoised together, and where references are read once. What is compiled is kept on disk, so that the next process
traces but does not compile again. A mark beside it says what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flux2_kernels import place_of
from flux2_kernels.constraint import NO_TRITON

from ..files import cache_folder
from .transformer import Flux2Transformer, TransformerConfig

if TYPE_CHECKING:
    from ..hardware import Hardware

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
GRAPHS = 64
"""The most graphs of one kind of block, of all models in the process. torch's own limit of 8 is an error of the request that exceeds
it, and two quantized models reach it."""


def reason_against(hardware: Hardware) -> str | None:
    """Why nothing can be compiled there, with how to get it where it can be got; None if it can."""
    if hardware.described:
        return None
    if hardware.kind == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl")
    ):
        return "there is no C++ compiler; install g++ or clang"
    if hardware.kind == "cuda" and not (place := place_of(hardware.device)).triton:
        return place.problem or NO_TRITON
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
    """Compile every block's forward, which happens when it first runs, in whatever thread that is.

    Args:
        transformer: changed in place. Its operations must be traceable: the reference's or Triton's.
        folder: where compiled code is kept, for the whole process; TORCHINDUCTOR_CACHE_DIR, where set, is used instead.
        backend: of torch.compile.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing the compiler sets the variable to torch's default, which is nobody's wish.
    if os.environ.get(FOLDER) in (None, default_cache_dir()):
        os.environ[FOLDER] = str(folder)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True, fullgraph=True)
    for name in ("forward", "keys_and_values"):  # all that calls blocks
        setattr(transformer, name, tracing(getattr(transformer, name)))


def tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the settings that blocks are traced with; set while it runs, since they hold for one thread."""
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        # Otherwise a number of tokens that equals another dimension once is taken to equal it always.
        with shapes.patch(use_duck_shape=False), dynamo.patch(recompile_limit=GRAPHS):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return traced
