"""The text encoders' language models (Mistral-3 for dev, Qwen3 for klein), cut to the layers whose hidden states are read.

What encoding leaves out is a :class:`Remainder`, which prompt expansion adds (:mod:`flux2_local.text.expand`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsDamagedError
from .ops import fused_attention


@dataclass(frozen=True)
class LanguageConfig:
    """The numbers of ``text_encoder/config.json`` (of its ``text_config``, where there is one)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    qk_norm: bool
    tied: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> LanguageConfig:
        """Read a transformers configuration.

        Raises:
            WeightsDamagedError: an architecture other than Mistral or Qwen3, or a rotary scaling they do not have.
        """
        text = config.get("text_config", config)
        kind = text.get("model_type")
        if kind not in ("mistral", "qwen3"):
            raise WeightsDamagedError(
                f"text_encoder/config.json describes a {kind!r} model; FLUX.2 reads prompts with Mistral-3 (dev) or "
                f"Qwen3 (klein). Check that the folder is a FLUX.2 model."
            )
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default" or text.get("sliding_window"):
            raise WeightsDamagedError(
                "text_encoder/config.json asks for scaled or windowed attention, which FLUX.2 has not."
            )
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or text.get("rope_theta") or 10000.0,
            qk_norm=kind == "qwen3",
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Past:
    """Keys and values of the tokens that one layer has read, for those that follow.

    Args:
        c: the model.
        length: tokens that there is room for.
        dtype, device: of the layer's activations.
    """

    def __init__(self, c: LanguageConfig, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.held = torch.empty(2, 1, c.num_key_value_heads, length, c.head_dim, dtype=dtype, device=device)
        self.length = 0

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, n, d] of the next n tokens -> those of all so far."""
        begin, self.length = self.length, self.length + k.shape[2]
        for held, new in zip(self.held, (k, v), strict=True):
            held[:, :, begin : self.length] = new
        keys, values = self.held[:, :, :, : self.length]
        return keys, values


class SelfAttention(nn.Module):
    def __init__(self, c: LanguageConfig) -> None:
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: Past | None = None
    ) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q).transpose(1, 2), rotary), rotate(self.k_norm(k).transpose(1, 2), rotary)
        v = v.transpose(1, 2)
        if past is not None:
            k, v = past.add(k, v)
        k, v = (t.repeat_interleave(self.groups, 1) if self.groups > 1 else t for t in (k, v))
        causal = mask is None and q.shape[2] == k.shape[2]  # a token alone sees all that came before it
        out = fused_attention(q, k, v, mask, causal)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the half-split kind; x [B, H, T, d], tables [T, d] in x's dtype."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class GatedMLP(nn.Module):
    def __init__(self, c: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, c: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: Past | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, past)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LanguageModel(nn.Module):
    """Token embedding and the first ``max(read)`` decoder layers.

    Args:
        config: the checkpoint's architecture.
        read: which hidden states are wanted: k is the output of layer k, counted from 1.
    """

    def __init__(self, config: LanguageConfig, read: tuple[int, ...]) -> None:
        super().__init__()
        if max(read) >= config.num_hidden_layers:
            raise WeightsDamagedError(
                f"This model's prompts are read from hidden states {read}, but its text encoder has only "
                f"{config.num_hidden_layers} layers; at least {max(read) + 1} are needed."
            )
        self.config, self.read = config, read
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(read)))

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        dim = self.config.head_dim
        inverse = 1.0 / (self.config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim))
        angles = torch.arange(length, device=device).float()[:, None] * inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states of the wanted layers, side by side.

        Args:
            ids: int64 [B, T].
            attention_mask: [B, T], 1 for text and 0 for padding, on either side.

        Returns:
            [B, T, len(read) · hidden_size].
        """
        length = ids.shape[1]
        mask = None
        if not bool(attention_mask.all()):
            causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            mask = causal[None, None] & attention_mask[:, None, None].bool()
        rotary = self.rotary(length, ids.device)
        x, kept = self.embed_tokens(ids), []
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, rotary, mask)
            if number in self.read:
                kept.append(x)
        return torch.cat(kept, -1)


class Remainder(nn.Module):
    """What encoding leaves out of a language model: the layers after those of :class:`LanguageModel`, the norm and the head.

    Args:
        config: the checkpoint's architecture.
        read: layers that :class:`LanguageModel` has.

    Attributes:
        head: None where the embedding's weights are the head's too.
    """

    def __init__(self, config: LanguageConfig, read: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers - read))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
