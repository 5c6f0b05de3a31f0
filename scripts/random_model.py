"""Write a published model at full size with random weights, for measuring speed where the real ones cannot be had.

    python -m scripts.random_model klein-4b build/klein-4b
    python -m scripts.random_model dev build/dev           # 112 GB; no more than a shard of 5 GB is in memory

What lies in the folder is what lies on the hub: every network's safetensors and configuration, dev's in shards; for klein the
transformer once more in one file in Black Forest Labs' own naming, as other programs read it. Weights are normal numbers of
variance 1 / inputs, 16 bit, the same for one seed. What such a model draws is noise; what it costs is what the real one costs.
klein's tokenizer knows single bytes only, and dev's is the bundled model's: a prompt is padded to the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_local import files
from flux2_local.errors import OutputError
from flux2_local.presets import BUNDLED, families, show_bytes

FAMILIES = ("klein-4b", "klein-9b", "dev")
SHARD = 5 * 10**9
"""Bytes of a file of dev's; klein's networks have a file each, which other programs insist on."""

PUBLISHED = "transformer.safetensors"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}"
)
DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm.scale",
    "attn.norm_k": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj.weight",
    "ff.linear_in": "img_mlp.0.weight",
    "ff.linear_out": "img_mlp.2.weight",
    "attn.norm_added_q": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj.weight",
    "ff_context.linear_in": "txt_mlp.0.weight",
    "ff_context.linear_out": "txt_mlp.2.weight",
}
FUSED = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1.weight",
    "attn.to_out": "linear2.weight",
    "attn.norm_q": "norm.query_norm.scale",
    "attn.norm_k": "norm.key_norm.scale",
}
AROUND = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""diffusers' names of layers -> Black Forest Labs' names; diffusers' ``convert_flux2_transformer_checkpoint_to_diffusers`` is
the way back."""


def wanted(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a network on the meta device holds, in bfloat16 but for whole numbers."""
    found = {
        name: like.to(torch.bfloat16 if like.is_floating_point() else like.dtype)
        for name, like in network.state_dict().items()
    }
    if isinstance(network, Qwen3ForCausalLM):
        del found["lm_head.weight"]  # it is the embedding
    return found


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes."""
    return sum(value.nbytes for value in tensors.values())


def drawn(tensors: dict[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Weights of these shapes and types."""
    found = {}
    for name, like in tensors.items():
        if like.ndim < 2:
            found[name] = torch.zeros(like.shape) if name.endswith(("bias", "mean")) else torch.ones(like.shape)
        else:
            found[name] = torch.empty(like.shape, dtype=torch.bfloat16).normal_(generator=draw)
            found[name] *= like[0].numel() ** -0.5
        found[name] = found[name].to(like.dtype)
    return found


def shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in parts of at most ``limit`` bytes; a larger tensor is alone."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, value in tensors.items():
        if parts[-1] and size(parts[-1]) + value.nbytes > limit:
            parts.append({})
        parts[-1][name] = value
    return parts


def as_published(weights: dict[str, Tensor], doubles: int, singles: int) -> Iterator[tuple[str, Tensor]]:
    """The transformer's weights under the names of the makers' own file; klein has no guidance embedder."""
    for old, new in AROUND.items():
        if "guidance_embedder" in old and f"{old}.weight" not in weights:
            continue
        value = weights[f"{old}.weight"]
        # The makers' file has the shift first, the hub's layout the scale.
        yield f"{new}.weight", torch.cat(value.chunk(2)[::-1]) if old == "norm_out.linear" else value
    for i in range(doubles):
        block = f"transformer_blocks.{i}."
        for old, new in DOUBLE.items():
            yield f"double_blocks.{i}.{new}", weights[f"{block}{old}.weight"]
        for stream, names in FUSED.items():
            yield (
                f"double_blocks.{i}.{stream}_attn.qkv.weight",
                torch.cat([weights[f"{block}attn.{n}.weight"] for n in names]),
            )
    for i in range(singles):
        for old, new in SINGLE.items():
            yield f"single_blocks.{i}.{new}", weights[f"single_transformer_blocks.{i}.{old}.weight"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with Qwen's chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, *SPECIAL])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end, *others = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=others[-1],
        pad_token=end,
        additional_special_tokens=others,
        padding_side="right",
    )
    fast.chat_template = TEMPLATE
    return fast


def write_network(file: Path, network: nn.Module, seed: int, limit: int | None = None, published: bool = False) -> None:
    """One network's folder, in shards where a ``limit`` is given, and a transformer also in the makers' naming beside it where that is
    to be ``published``. Holds a file's weights at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(network, (Qwen3ForCausalLM, Mistral3ForConditionalGeneration)):
        network.save_config(file.parent)
    tensors, draw = wanted(network), torch.Generator().manual_seed(seed)
    parts, places = [tensors] if limit is None else shards(tensors, limit), {}
    for number, part in enumerate(parts, 1):
        path = file if len(parts) == 1 else file.with_stem(f"{file.stem}-{number:05}-of-{len(parts):05}")
        weights = drawn(part, draw)
        save_file(weights, path, metadata={"format": "pt"})
        print(f"{path}: {show_bytes(path.stat().st_size)}", flush=True)
        places |= dict.fromkeys(part, path.name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": size(tensors)}, "weight_map": places}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    if published:
        numbers = network.config.num_layers, network.config.num_single_layers
        published = {k: v.contiguous() for k, v in as_published(weights, *numbers)}
        save_file(published, file.parent.parent / PUBLISHED)


def text_config(family: str) -> PretrainedConfig:
    """The text encoder's configuration, as the family's hub models have it."""
    text = dict(families()[family]["text_encoder"])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": text.pop("rope_theta")}}
    if text.pop("model_type") == "qwen3":
        return Qwen3Config(**text, **rope, tie_word_embeddings=True, dtype="bfloat16")
    return Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **text, **rope},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def frame(family: str, folder: Path, seed: int) -> None:
    """A folder of ``family`` with everything but the weights of its transformer and its text encoder."""
    numbers, dev = families()[family], family == "dev"
    with torch.device("meta"):
        transformer, vae = Flux2Transformer2DModel(**numbers["transformer"]), AutoencoderKLFlux2(**numbers["vae"])
    for part, config in (
        ("transformer", transformer.save_config),
        ("text_encoder", text_config(family).save_pretrained),
    ):
        config(folder / part)
    write_network(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, seed + 2)
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    ).save_pretrained(folder / "scheduler")
    if dev:  # the bundled model's tokenizer: it is of dev's kind
        shutil.copytree(BUNDLED / "tokenizer", folder / "tokenizer")
    else:
        tokenizer().save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "Flux2Pipeline" if dev else "Flux2KleinPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration" if dev else "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(
        json.dumps(index | ({} if dev else {"is_distilled": True}), indent=2), "utf-8"
    )


def networks(family: str) -> tuple[nn.Module, nn.Module]:
    """The transformer and the text encoder, on the meta device."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**families()[family]["transformer"])
        kind = Mistral3ForConditionalGeneration if family == "dev" else Qwen3ForCausalLM
        return transformer, kind(text_config(family))


def total(family: str, published: bool) -> int:
    """Bytes of the two large networks' files, about those of the folder."""
    transformer, encoder = (size(wanted(network)) for network in networks(family))
    return transformer * (1 + published) + encoder


def write(family: str, folder: Path, seed: int) -> None:
    """All files of a ``family`` below ``folder``; dev's are not published once more, which would be 64 GB."""
    frame(family, folder, seed)
    write_networks(family, folder, seed, published=family != "dev")


def write_networks(family: str, folder: Path, seed: int, published: bool) -> None:
    """The weights of the two large networks, below the folder of :func:`frame`."""
    limit = SHARD if family == "dev" else None
    transformer, encoder = networks(family)
    write_network(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer, seed, limit, published)
    write_network(folder / "text_encoder" / "model.safetensors", encoder, seed + 1, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} is there already; name another folder")
    need = total(args.family, args.family != "dev") + 2**29  # the autoencoder and what is small
    print(f"{args.family}: {show_bytes(need)} to be written to {args.folder}", flush=True)
    try:
        check_room(args.folder.absolute().parent, need)
    except OutputError as error:
        parser.error(f"{error}")
    write(args.family, args.folder, args.seed)


def check_room(folder: Path, need: int) -> None:
    """Refuse before anything is made, the folders above included.

    Raises:
        OutputError: the disk has too little room.
    """
    at = next(parent for parent in (folder, *folder.parents) if parent.exists())
    files.check_room(at, need, "the second argument")


if __name__ == "__main__":
    main()
