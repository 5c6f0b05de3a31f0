"""torch.compile for the repeated blocks: two small graphs, one per kind of block, for every size of picture.

What is compiled is kept on disk, so that the next process traces but does not compile again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.fx.experimental._config as shapes

from .transformer import Flux2Transformer


def compile_blocks(transformer: Flux2Transformer, folder: Path, backend: str = "inductor") -> None:
    """Compile every block's forward, which happens when it first runs.

    Args:
        transformer: changed in place. Its operations must be traceable: the reference's or Triton's.
        folder: where compiled code is kept, for the whole process; TORCHINDUCTOR_CACHE_DIR, where set, is used instead.
        backend: of torch.compile.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Otherwise a number of tokens that equals another dimension once is taken to equal it always.
    shapes.use_duck_shape = False
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True, fullgraph=True)
