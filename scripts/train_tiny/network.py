"""The transformer, and a lean forward over its weights for training.

:func:`velocity` computes what ``Flux2Transformer2DModel.forward`` computes (a test holds the two together), in its input's dtype,
with rotary tables made once and attention written out, which trains about twice as fast on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor, nn

TEXT_TOKENS = 80
"""Length that every prompt is padded or cut to (dev's is 512)."""

CONFIG = {
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "timestep_guidance_channels": 64,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (16, 16, 16, 16),
    "guidance_embeds": True,
}


def build() -> Flux2Transformer2DModel:
    """A fresh transformer: Xavier weights, modulations and output at zero so that every block starts as identity."""
    model = Flux2Transformer2DModel(**CONFIG)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.xavier_uniform_(p)
        if "modulation" in name or name in ("proj_out.weight", "norm_out.linear.weight"):
            nn.init.zeros_(p)
    return model


@lru_cache(maxsize=512)
def rotary(height: int, width: int, text: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [text + height·width, head_dim/2] for text at (0,0,0,l) followed by the image at (0,h,w,0)."""
    zero = torch.zeros(1)
    ids = torch.cat(
        [
            torch.cartesian_prod(zero, zero, zero, torch.arange(text).float()),
            torch.cartesian_prod(zero, torch.arange(height).float(), torch.arange(width).float(), zero),
        ]
    )
    freqs = 1.0 / 2000 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.cat([ids[:, i, None].double() * freqs for i in range(4)], 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return (x.float() * scale * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D] each -> [B, T, H·D]. Written out in bf16 on a CPU, where it is faster than the flash kernel's backward."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = (
        F.scaled_dot_product_attention(q, k, v)
        if q.is_cuda or q.dtype == torch.float32
        else (q * q.shape[-1] ** (-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    )
    return out.transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def velocity(
    model: Flux2Transformer2DModel,
    latents: Tensor,
    text: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    tables: tuple[Tensor, Tensor],
    linear: Callable[[nn.Linear, Tensor], Tensor] | None = None,
    hidden: list[Tensor] | None = None,
) -> Tensor:
    """The model's output, noise minus picture.

    Args:
        model: its weights are used, its own forward is not.
        latents: [B, N, 128] noisy packed latents.
        text: [B, L, 384] prompt embeddings, of the same dtype.
        sigma: [B] noise level in [0, 1], float32.
        guidance: [B] guidance scale, float32.
        tables: of :func:`rotary` for this shape, or each row's own [B, L + N, head_dim/2].
        linear: how a linear layer is applied (LoRA training passes its own).
        hidden: gets the image's hidden state [B, N, 256] after every single-stream block.

    Returns:
        [B, N, 128], float32.
    """
    dtype = latents.dtype
    apply = linear or (lambda layer, x: F.linear(x, layer.weight.to(x.dtype)))
    cos, sin = (table.unsqueeze(-2) for table in tables)

    embed = model.time_guidance_embed
    time = embed.timestep_embedder
    guide = embed.guidance_embedder
    temb = apply(time.linear_2, F.silu(apply(time.linear_1, embed.time_proj(sigma * 1000).to(dtype))))
    temb = temb + apply(guide.linear_2, F.silu(apply(guide.linear_1, embed.time_proj(guidance * 1000).to(dtype))))
    act = F.silu(temb)
    mod_img = apply(model.double_stream_modulation_img.linear, act)[:, None].chunk(6, -1)
    mod_txt = apply(model.double_stream_modulation_txt.linear, act)[:, None].chunk(6, -1)
    shift, scale, gate = apply(model.single_stream_modulation.linear, act)[:, None].chunk(3, -1)

    x, c = apply(model.x_embedder, latents), apply(model.context_embedder, text)
    length = c.shape[1]
    for block in model.transformer_blocks:
        a = block.attn
        heads = (-1, a.head_dim)
        n, m = modulated(x, mod_img[0], mod_img[1]), modulated(c, mod_txt[0], mod_txt[1])
        q = torch.cat(
            [
                rms(apply(a.add_q_proj, m).unflatten(-1, heads), a.norm_added_q.weight),
                rms(apply(a.to_q, n).unflatten(-1, heads), a.norm_q.weight),
            ],
            1,
        )
        k = torch.cat(
            [
                rms(apply(a.add_k_proj, m).unflatten(-1, heads), a.norm_added_k.weight),
                rms(apply(a.to_k, n).unflatten(-1, heads), a.norm_k.weight),
            ],
            1,
        )
        v = torch.cat([apply(a.add_v_proj, m), apply(a.to_v, n)], 1).unflatten(-1, heads)
        out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + mod_img[2] * apply(a.to_out[0], out[:, length:])
        c = c + mod_txt[2] * apply(a.to_add_out, out[:, :length])
        x = x + mod_img[5] * apply(
            block.ff.linear_out, swiglu(apply(block.ff.linear_in, modulated(x, mod_img[3], mod_img[4])))
        )
        c = c + mod_txt[5] * apply(
            block.ff_context.linear_out, swiglu(apply(block.ff_context.linear_in, modulated(c, mod_txt[3], mod_txt[4])))
        )

    x = torch.cat([c, x], 1)
    for block in model.single_transformer_blocks:
        a = block.attn
        packed = apply(a.to_qkv_mlp_proj, modulated(x, shift, scale))
        qkv, mlp = packed.split([3 * a.inner_dim, packed.shape[-1] - 3 * a.inner_dim], -1)
        q, k, v = (part.unflatten(-1, (-1, a.head_dim)) for part in qkv.chunk(3, -1))
        out = attention(rotate(rms(q, a.norm_q.weight), cos, sin), rotate(rms(k, a.norm_k.weight), cos, sin), v)
        x = x + gate * apply(a.to_out, torch.cat([out, swiglu(mlp)], -1))
        if hidden is not None:
            hidden.append(x[:, length:])

    # The last norm's projection yields scale first, then shift (AdaLayerNormContinuous).
    final_scale, final_shift = apply(model.norm_out.linear, act)[:, None].chunk(2, -1)
    return apply(model.proj_out, modulated(x[:, length:], final_shift, final_scale)).float()
