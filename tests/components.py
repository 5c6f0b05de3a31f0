"""Small random FLUX.2 models, written by diffusers itself in the exact layout of the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scripts.train_tiny.language import SIGHT

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]
{%- elif message['role'] == 'user' %}[INST]
{%- for p in message['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}[/INST]
{%- elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}
{%- else %}{{- raise_exception('unknown role') }}{%- endif %}
{%- endfor %}
"""
QWEN_TEMPLATE = """\
{%- for message in messages %}
{{- '<s>' + message.role + '\n' + message.content + '</s>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<s>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

TRANSFORMER = {
    "in_channels": 32,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
VAE = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 64,
}


def tokenizer(template: str, padding_side: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every byte is a token."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
        additional_special_tokens=SPECIAL[4:],
    )
    fast.chat_template = template
    return fast


def language_numbers(layers: int, vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that every part matters to the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 0.15 if p.ndim == 1 else 1.2 / max(1, p[0].numel()) ** 0.5, generator=generator)
    return module


def autoencoder() -> AutoencoderKLFlux2:
    vae = randomised(AutoencoderKLFlux2(**VAE), 2)
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(3))
    vae.bn.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(4))
    return vae.eval()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )


def save_dev(folder: Path) -> Path:
    """A Flux2Pipeline: Mistral-3 with 32 layers, padded on the left."""
    tok = tokenizer(MISTRAL_TEMPLATE, "left")
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **language_numbers(32, len(tok))},
        vision_config=SIGHT,
        image_token_index=3,
    )
    text = randomised(Mistral3ForConditionalGeneration(config), 0).eval()
    net = randomised(Flux2Transformer2DModel(**TRANSFORMER, joint_attention_dim=48, guidance_embeds=True), 1).eval()
    pipe = Flux2Pipeline(scheduler(), autoencoder(), text, tok, net)
    pipe.save_pretrained(folder)
    return folder


def save_klein(folder: Path, distilled: bool) -> Path:
    """A Flux2KleinPipeline: Qwen3 with 30 layers, padded on the right."""
    tok = tokenizer(QWEN_TEMPLATE, "right")
    text = randomised(Qwen3ForCausalLM(Qwen3Config(**language_numbers(30, len(tok)))), 5).eval()
    net = randomised(Flux2Transformer2DModel(**TRANSFORMER, joint_attention_dim=48, guidance_embeds=False), 6).eval()
    pipe = Flux2KleinPipeline(scheduler(), autoencoder(), text, tok, net, is_distilled=distilled)
    pipe.save_pretrained(folder)
    return folder


def save_klein_kv(folder: Path, klein: Path) -> Path:
    """The same components as a Flux2KleinKVPipeline, which reads references once."""
    pipe = Flux2KleinPipeline.from_pretrained(klein)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    Flux2KleinKVPipeline(**{name: pipe.components[name] for name in names}).save_pretrained(folder)
    return folder
