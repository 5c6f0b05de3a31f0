"""A transformer in one file: safetensors or GGUF, in the hub's naming or its makers', which ComfyUI's files have too.

Every tensor comes by itself, under the hub's name, still as it lies in the mapped file: renamed, split and decoded when it is asked
for, so that the file is never in memory as a whole in another form.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import mapping, weights
from .errors import WeightsDamagedError
from .files import reason
from .mapping import Coded
from .weights import FETCH_AGAIN, Tensors

PREFIX = "model.diffusion_model."
"""What ComfyUI's files put before every name."""

AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
"""The makers' names of layers outside the blocks -> the hub's."""

LAST_NORM = ("final_layer.adaLN_modulation.1", "norm_out.linear")
"""The makers' has the shift's rows first, the hub's the scale's."""

BLOCKS = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    ),
}
"""The makers' name of a stack of blocks -> the hub's, and the names of the layers in one."""

SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers of double blocks whose rows are three of the hub's."""

SCALES = (".weight_scale", ".scale_weight")
"""How the names end of what 8-bit weights are to be multiplied with."""


def read(path: Path) -> Tensors:
    """The tensors of a transformer's single file under the hub's names, in the order in which they lie there.

    Raises:
        WeightsDamagedError: it is unreadable, or of a kind that cannot be read here.
    """
    given = read_gguf(path) if path.suffix.lower() == ".gguf" else read_safetensors(path)
    for name, value in given:
        yield from renamed(name.removeprefix(PREFIX), value)


def renamed(name: str, value: Tensor | Coded) -> Iterator[tuple[str, Tensor | Coded]]:
    """A tensor under the hub's name, or the three that it holds there; other names than the makers' stay."""
    layer, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    stack, _, inside = layer.partition(".")
    number, _, part = inside.partition(".")
    if layer in AROUND:
        yield f"{AROUND[layer]}.{leaf}", value
    elif layer == LAST_NORM[0] and leaf == "weight":
        yield f"{LAST_NORM[1]}.{leaf}", mapping.joined(mapping.chunks(value, 2)[::-1])
    elif stack == "double_blocks" and part in SPLIT and leaf == "weight":
        for target, rows in zip(SPLIT[part], mapping.chunks(value, 3), strict=True):
            yield f"transformer_blocks.{number}.{target}.{leaf}", rows
    elif stack in BLOCKS and part in BLOCKS[stack][1]:
        blocks, names = BLOCKS[stack]
        yield f"{blocks}.{number}.{names[part]}.{leaf}", value
    else:
        yield name, value


# ---- safetensors ----


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file; weights that have a scale beside them are to be multiplied with it."""
    scales = {}
    for name, value in weights.read_files([path]):
        if name.endswith(SCALES):
            if value.numel() != 1:
                raise WeightsDamagedError(
                    f"{path.name} scales the weights of {name.rpartition('.')[0]} in parts, which cannot be read here. Use a file "
                    f"in 16 bit or GGUF, or one with a scale per layer."
                )
            scales[f"{name.rpartition('.')[0]}.weight"] = value.float().reshape(()).clone()
    for name, value in weights.read_files([path]):
        yield name, value if name not in scales else Coded(value, value.shape, partial(scaled, scales[name]))


def scaled(scale: Tensor, rows: Tensor) -> Tensor:
    """Some rows times the layer's scale, in float32."""
    return rows.float() * scale


# ---- GGUF ----


def read_gguf(path: Path) -> Tensors:
    """The tensors of a GGUF file. Floats are as they lie there, anything else is coded.

    Raises:
        WeightsDamagedError: it is unreadable.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    plain = {types.F32: torch.float32, types.F16: torch.float16, types.BF16: torch.bfloat16}
    try:
        found = [
            (int(e.data_offset), int(e.n_bytes), str(e.name), e.tensor_type, [int(n) for n in reversed(e.shape)])
            for e in gguf.GGUFReader(path).tensors
        ]
        whole = mapping.mapped(path)
    except Exception as error:
        raise WeightsDamagedError(f"{path} is not a readable GGUF file: {reason(error)}. {FETCH_AGAIN}") from error
    for begin, size, name, kind, shape in sorted(found, key=lambda one: one[0]):
        packed = mapping.part(whole, begin, begin + size)
        if kind in plain:
            yield name, packed.view(plain[kind]).view(shape)
        else:
            rows = packed.view(prod(shape[:-1]), -1)
            yield name, Coded(rows, tuple(shape), partial(dequantised, kind, f"{path.name} stores {name}"))
        del packed


def dequantised(kind: Any, what: str, rows: Tensor) -> Tensor:
    """Some rows of a GGUF tensor in float32.

    Args:
        kind: how they are quantised, of ``gguf.GGMLQuantizationType``.
        what: the tensor, for errors.
        rows: uint8 [n, bytes].

    Raises:
        WeightsDamagedError: this kind is not known.
    """
    import gguf

    try:
        return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind))
    except NotImplementedError as error:
        raise WeightsDamagedError(
            f"{what} as {kind.name}, which cannot be read here. Use a Q8_0, Q6_K, Q5_K, Q4_K or 16-bit file."
        ) from error
