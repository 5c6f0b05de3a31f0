"""The FLUX.2 transformer over the weights of a ``Flux2Transformer2DModel`` checkpoint.

What depends only on the schedule (timestep and guidance embeddings, modulations), on the prompt (context embedding) or on
the picture's size (rotary tables) is computed once and passed in; a step is then :meth:`Flux2Transformer.forward`.

Shapes: B pictures, N image tokens (reference tokens included), L text tokens, D the width, H heads of d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import REFERENCE, Input, Ops, Quantizer, Rotary, Rows
from .recent import Recent

ROPE_THETA = 2000

TABLES = 4
"""Schedules whose modulations are kept; of rotary tables, those of the last size are."""


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture's numbers, as in ``transformer/config.json``."""

    num_layers: int = 8
    num_single_layers: int = 48
    num_attention_heads: int = 48
    attention_head_dim: int = 128
    in_channels: int = 128
    out_channels: int | None = None
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = ROPE_THETA
    eps: float = 1e-6
    guidance_embeds: bool = True

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TransformerConfig:
        """Pick the fields that matter out of a ``config.json``."""
        known = {k: v for k, v in config.items() if k in cls.__dataclass_fields__}
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        return cls(**known)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class Modulation:
    """Everything that a step takes from its timestep and guidance, each [B, 1, D].

    ``img`` and ``txt``: shift, scale, gate of attention, then of the MLP, for the double blocks. ``single``: shift, scale,
    gate. ``out``: scale, shift of the last norm.
    """

    img: tuple[Tensor, ...]
    txt: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    out: tuple[Tensor, ...]


class Entry(NamedTuple):
    """How tokens enter what reads them next: the modulation of the norm in front of it, [B, 1, D] each, and its quantizer."""

    shift: Tensor
    scale: Tensor
    into: Quantizer | None


class Stream(NamedTuple):
    """Tokens between two blocks: as they are, [B, T, D], and as the next one's :class:`Entry` makes them. Both are written in one
    pass, at the end of the block before."""

    tokens: Tensor
    normal: Input

    def part(self, where: Any) -> Stream:
        """Some pictures, or some tokens."""
        normal = self.normal
        return Stream(
            self.tokens[where], Rows(*(x[where] for x in normal)) if isinstance(normal, Rows) else normal[where]
        )


def entered(x: Tensor, entry: Entry, ops: Ops) -> Stream:
    return Stream(x, ops.modulated_norm(x, *entry))


def joined(text: Stream, image: Stream) -> Stream:
    """One sequence, text first."""
    tokens = torch.cat([text.tokens, image.tokens], 1)
    if isinstance(text.normal, Rows) and isinstance(image.normal, Rows):
        return Stream(tokens, Rows(*(torch.cat(both, 1) for both in zip(text.normal, image.normal, strict=True))))
    return Stream(tokens, torch.cat([text.normal, image.normal], 1))  # type: ignore[list-item]


def taken(*layers: nn.Module) -> Quantizer | None:
    """How all of ``layers`` want their one input's rows quantized; None where they differ, or one takes them dense."""
    first, *others = (getattr(layer, "quantizer", None) for layer in layers)
    return first if all(other == first for other in others) else None


@dataclass(frozen=True)
class Kept:
    """Keys and values of R reference tokens in one block, [1, R, H, d] each.

    They do not depend on the step, the prompt or the picture in models whose references attend to nothing but themselves.

    Attributes:
        open: whether they are still to be written, by the pass through the references alone.
    """

    keys: Tensor
    values: Tensor
    open: bool = False

    def attended(self, ops: Ops, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
        """Attention of q [B, T, H, d] to k and v, of the same shape, and to what is kept; or k and v are what is to be."""
        if self.open:
            self.keys.copy_(k)  # before attention, which may overwrite it
            self.values.copy_(v)
            return ops.attend(q, k, v, out)
        rows = len(q), -1, -1, -1
        k, v = torch.cat([k, self.keys.expand(rows)], 1), torch.cat([v, self.values.expand(rows)], 1)
        return ops.attend(q, k, v, out)


def attended(ops: Ops, q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, out: Tensor | None = None) -> Tensor:
    return ops.attend(q, k, v, out) if kept is None else kept.attended(ops, q, k, v, out)


class Turn(NamedTuple):
    """What a block is told of the others: how tokens enter what follows it, of a double block image and text, and the references'
    keys and values."""

    following: tuple[Entry, ...]
    kept: Kept | None = None


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


class Scale(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = linear(channels, width)
        self.linear_2 = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeGuidanceEmbedding(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.channels = config.timestep_guidance_channels
        self.timestep_embedder = TimestepEmbedding(self.channels, config.width)
        self.guidance_embedder = TimestepEmbedding(self.channels, config.width) if config.guidance_embeds else None

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """[B] timestep and guidance, each times 1000, -> [B, D]."""
        emb = self.timestep_embedder(sinusoid(timestep, self.channels).to(timestep.dtype))
        if guidance is not None and self.guidance_embedder is not None:
            emb = emb + self.guidance_embedder(sinusoid(guidance, self.channels).to(guidance.dtype))
        return emb


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Cosines then sines of t at ``channels`` / 2 frequencies from 1 to 1/10000, float32 [B, channels]."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(exponent)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


class ModulationLinear(nn.Module):
    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = linear(width, parts * width)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb))[:, None].chunk(self.parts, -1)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_in = linear(width, 2 * inner)
        self.linear_out = linear(inner, width)

    def forward(self, x: Input, ops: Ops) -> Tensor:
        inner, into = self.linear_in(x), taken(self.linear_out)
        out: Tensor = self.linear_out(ops.swiglu(inner, None) if into is None else ops.swiglu_rows(inner, into, None))
        return out


IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class JointAttention(nn.Module):
    """Attention of a double block: text and image have their own projections and attend to each other."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, linear(width, width))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, Scale(head_dim))
        self.to_out = nn.ModuleList([linear(width, width)])

    def forward(
        self, image: Stream, text: Stream | None, rotary: Rotary, ops: Ops, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, D] and [B, L, D], or None, -> the same. The sequence is text first."""
        batch, count, width = image.tokens.shape
        length = 0 if text is None else text.tokens.shape[1]
        total = length + count
        q, k, v = (image.tokens.new_empty(batch, total, width // self.head_dim, self.head_dim) for _ in range(3))
        for x, rows, (to_q, to_k, to_v, norm_q, norm_k) in (
            (text, slice(0, length), self._own(TEXT)),
            (image, slice(length, total), self._own(IMAGE)),
        ):
            if x is None:
                continue
            part, (own_q, own_k, own_v) = rotary.rows(rows.start, rows.stop), (t[:, rows] for t in (q, k, v))
            new_q, new_k = (to(x.normal).unflatten(-1, (-1, self.head_dim)) for to in (to_q, to_k))
            ops.qk_norm_rope(new_q, new_k, norm_q.weight, norm_k.weight, part, (own_q, own_k))
            own_v.copy_(to_v(x.normal).unflatten(-1, (-1, self.head_dim)))
        out = attended(ops, q, k, v, kept).flatten(2)
        answer = None if text is None else self.to_add_out(out[:, :length])  # type: ignore[operator]
        return self.to_out[0](out[:, length:]), answer  # type: ignore[operator, index]

    def _own(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in names)

    def taken(self) -> tuple[Quantizer | None, Quantizer | None]:
        """How the projections of image and of text want their rows."""
        return taken(*self._own(IMAGE[:3])), taken(*self._own(TEXT[:3]))


class DoubleBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = JointAttention(config.width, config.attention_head_dim)
        self.ff = FeedForward(config.width, config.mlp_width)
        self.ff_context = FeedForward(config.width, config.mlp_width)

    def entries(self, mod: Modulation) -> tuple[Entry, ...]:
        """Of image and text."""
        image, text = self.attn.taken()
        return Entry(mod.img[0], mod.img[1], image), Entry(mod.txt[0], mod.txt[1], text)

    def forward(
        self, x: Stream, c: Stream | None, mod: Modulation, rotary: Rotary, ops: Ops, turn: Turn
    ) -> tuple[Stream, Stream | None]:
        """Image [B, N, D] and text [B, L, D], or None, through attention and MLP."""
        attn, attn_c = self.attn(x, c, rotary, ops, turn.kept)
        image, text = turn.following
        x = self._through(x.tokens, attn, mod.img[2:], self.ff, image, ops)
        if c is None:
            return x, None
        return x, self._through(c.tokens, attn_c, mod.txt[2:], self.ff_context, text, ops)

    def _through(
        self, x: Tensor, y: Tensor, mod: tuple[Tensor, ...], ff: FeedForward, following: Entry, ops: Ops
    ) -> Stream:
        """Add what attention answers, ``y``, and the MLP's part; ``mod``: the gate of the one, then shift, scale and gate of the
        other."""
        gate, shift, scale, ff_gate = mod
        x, normal = ops.residual_norm(x, gate, y, shift, scale, taken(ff.linear_in))
        return Stream(*ops.residual_norm(x, ff_gate, ff(normal, ops), *following))


class ParallelAttention(nn.Module):
    """Attention and MLP of a single block, side by side between one input and one output projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.width, self.inner = config.width, config.mlp_width
        self.to_qkv_mlp_proj = linear(self.width, 3 * self.width + 2 * self.inner)
        self.norm_q, self.norm_k = Scale(self.head_dim), Scale(self.head_dim)
        self.to_out = linear(self.width + self.inner, self.width)

    def forward(self, x: Input, rotary: Rotary, ops: Ops, kept: Kept | None = None) -> Tensor:
        """[B, L + N, D] -> [B, L + N, D]."""
        packed, into = self.to_qkv_mlp_proj(x), taken(self.to_out)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in packed[..., : 3 * self.width].chunk(3, -1))
        q, k = ops.qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rotary, None)
        mlp = packed[..., 3 * self.width :]
        if into is None:
            both = mlp.new_empty(*mlp.shape[:-1], self.width + self.inner)
            ops.swiglu(mlp, both[..., self.width :])
            attended(ops, q, k, v, kept, both[..., : self.width].unflatten(-1, (-1, self.head_dim)))
        else:
            both = ops.swiglu_rows(mlp, into, attended(ops, q, k, v, kept).flatten(2))
        out: Tensor = self.to_out(both)
        return out


class SingleBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = ParallelAttention(config)

    def entries(self, mod: Modulation) -> tuple[Entry, ...]:
        return (Entry(mod.single[0], mod.single[1], taken(self.attn.to_qkv_mlp_proj)),)

    def forward(self, x: Stream, mod: Modulation, rotary: Rotary, ops: Ops, turn: Turn) -> Stream:
        """Text and image together, [B, L + N, D]."""
        y = self.attn(x.normal, rotary, ops, turn.kept)
        return Stream(*ops.residual_norm(x.tokens, mod.single[2], y, *turn.following[0]))


class Shortcut(Protocol):
    """What decides for one picture whether a step's blocks are computed (:class:`flux2_local.cache.StepCache`)."""

    @property
    def probes(self) -> bool:
        """Whether the first block is computed before it decides; then "the blocks" below are the others."""

    def rest(self, added: Tensor) -> Tensor | None:
        """What the blocks would add to the tokens, given what the first added (zeros without it); None to compute them."""

    def keep(self, added: Tensor) -> None:
        """What the blocks did add."""


class OutputNorm(nn.Module):
    """Holds the projection that yields the last norm's scale and shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = linear(width, 2 * width)


class Flux2Transformer(nn.Module):
    """The denoiser of FLUX.2 dev and klein.

    Args:
        config: the checkpoint's architecture.
        ops: the implementation of everything between the matmuls.

    Attributes:
        tables: modulations of the last schedules.
    """

    def __init__(self, config: TransformerConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.tables: Recent[list[Modulation]] = Recent(TABLES)
        self._rotary: Recent[Rotary] = Recent(1)
        width = config.width
        self.time_guidance_embed = TimeGuidanceEmbedding(config)
        self.double_stream_modulation_img = ModulationLinear(width, 6)
        self.double_stream_modulation_txt = ModulationLinear(width, 6)
        self.single_stream_modulation = ModulationLinear(width, 3)
        self.x_embedder = linear(config.in_channels, width)
        self.context_embedder = linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = OutputNorm(width)
        self.proj_out = linear(width, config.out_channels or config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def schedule_dtype(self) -> torch.dtype:
        """Of the parts that only :meth:`modulation` uses; it may be wider than :attr:`dtype`."""
        return self.norm_out.linear.weight.dtype

    def modulation(self, sigma: Tensor, guidance: float | None) -> Modulation:
        """What the step at noise level ``sigma`` needs.

        Args:
            sigma: 0-dimensional or [B], in [0, 1], already rounded to the dtype that the sampler works in.
            guidance: the guidance scale, or None for models without guidance embedding.
        """
        kind = self.schedule_dtype
        timestep = sigma.reshape(-1).to(kind) * 1000
        scale = None if guidance is None else torch.full_like(timestep, guidance, dtype=torch.float32).to(kind) * 1000
        temb = self.time_guidance_embed(timestep, scale)
        out = self.norm_out.linear(F.silu(temb))[:, None].chunk(2, -1)
        parts = (
            self.double_stream_modulation_img(temb),
            self.double_stream_modulation_txt(temb),
            self.single_stream_modulation(temb),
            out,
        )
        # Copied, since graphs of compiled blocks are guarded on where in its storage a tensor begins.
        return Modulation(*(tuple(p.to(self.dtype, copy=True) for p in part) for part in parts))

    def rotary(self, ids: Tensor) -> Rotary:
        """Rotary tables for positions ``ids`` [T, 4] (time, row, column, text index), computed in float64; the last are kept."""
        key = tuple(ids.shape), ids.dtype, ids.device, ids.cpu().numpy().tobytes()
        return self._rotary.get(key, lambda: self._make_rotary(ids))

    def _make_rotary(self, ids: Tensor) -> Rotary:
        home, tables = ids.device, []
        if home.type == "mps":  # which has no float64
            ids = ids.cpu()
        for axis, dim in enumerate(self.config.axes_dims_rope):
            powers = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
            tables.append(torch.outer(ids[:, axis].double(), 1.0 / self.config.rope_theta**powers))
        angles = torch.cat(tables, -1)
        return Rotary(angles.cos().float().to(home), angles.sin().float().to(home))

    def context(self, text: Tensor) -> Tensor:
        """Prompt embeddings [B, L, joint] -> [B, L, D]."""
        out: Tensor = self.context_embedder(text)
        return out

    def keys_and_values(self, references: Tensor, mod: Modulation, rotary: Rotary) -> list[Kept]:
        """What reference tokens contribute to every step, one :class:`Kept` per block, where they attend to themselves alone.

        Args:
            references: [1, R, channels].
            mod: of :meth:`modulation` at noise level 0: references are pictures.
            rotary: of :meth:`rotary` for their R positions.
        """
        tokens = self.x_embedder(references)
        shape = *tokens.shape[:2], self.config.num_attention_heads, self.config.attention_head_dim
        kept = [Kept(tokens.new_empty(shape), tokens.new_empty(shape), open=True) for _ in self._all()]
        (image, _), turns = self._turns(mod, kept)
        x = entered(tokens, image, self.ops)
        for block, turn in zip(self._all(), turns, strict=True):
            if isinstance(block, DoubleBlock):
                x, _ = block(x, None, mod, rotary, self.ops, turn)
            else:
                x = block(x, mod, rotary, self.ops, turn)
        return [replace(one, open=False) for one in kept]

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        mod: Modulation,
        rotary: Rotary,
        keep: int,
        shortcuts: Sequence[Shortcut] | None = None,
        kept: Sequence[Kept] | None = None,
    ) -> Tensor:
        """One evaluation of the velocity field.

        Args:
            latents: [B, N, channels]; the picture's own tokens first, then its references'.
            context: [B, L, D] of :meth:`context`.
            mod: of :meth:`modulation`.
            rotary: of :meth:`rotary` for the L text positions followed by the N image positions.
            keep: how many leading image tokens the answer is wanted for.
            shortcuts: one per row of the batch, asked whether the blocks are to be computed.
            kept: of :meth:`keys_and_values`; then the references are not among ``latents``.

        Returns:
            [B, keep, channels], the dtype of the weights.
        """
        (image, text), turns = self._turns(mod, kept)
        x, c = entered(self.x_embedder(latents), image, self.ops), entered(context, text, self.ops)
        if shortcuts is None:
            return self._output(self._blocks(x, c, 0, mod, rotary, turns).part((slice(None), slice(keep))).normal)
        embedded = x.tokens[:, :keep]
        probed = int(shortcuts[0].probes)
        if probed:
            x, c = self.transformer_blocks[0](x, c, mod, rotary, self.ops, turns[0])
        entering = x.tokens[:, :keep]
        # Subtracted one by one: a part of the whole batch's difference would keep all of it alive.
        known = [s.rest(after - before) for s, after, before in zip(shortcuts, entering, embedded, strict=True)]
        pictures = [a if added is None else a + added for a, added in zip(entering, known, strict=True)]
        due = [i for i, added in enumerate(known) if added is None]
        if due:
            some = slice(None) if len(due) == len(known) else due
            computed = self._blocks(x.part(some), c.part(some), probed, mod, rotary, turns).tokens[:, :keep]
            for i, picture in zip(due, computed, strict=True):
                shortcuts[i].keep(picture - entering[i])
                pictures[i] = picture
        return self._output(self.ops.modulated_norm(torch.stack(pictures), *turns[-1].following[0]))

    def _turns(self, mod: Modulation, kept: Sequence[Kept] | None) -> tuple[tuple[Entry, ...], list[Turn]]:
        """How image and text enter the first block, and each block's turn."""
        scale, shift = mod.out
        entries = [block.entries(mod) for block in self._all()]
        entries.append((Entry(shift, scale, None),))
        count = len(self.transformer_blocks)
        (joint,) = entries[count]
        # Text and image are still apart there. Compiled blocks are guarded on which of their inputs are one tensor: none are.
        entries[count] = joint, Entry(joint.shift[:], joint.scale[:], joint.into)
        kepts: Sequence[Kept | None] = kept or [None] * (len(entries) - 1)
        return entries[0], [Turn(*both) for both in zip(entries[1:], kepts, strict=True)]

    def _all(self) -> list[Any]:
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def _blocks(self, x: Stream, c: Stream, first: int, mod: Modulation, rotary: Rotary, turns: list[Turn]) -> Stream:
        """The double blocks from number ``first`` on and every single one; the image tokens of the result."""
        count = len(self.transformer_blocks)
        for block, turn in list(zip(self.transformer_blocks, turns[:count], strict=True))[first:]:
            x, c = block(x, c, mod, rotary, self.ops, turn)
        length, both = c.tokens.shape[1], joined(c, x)
        for block, turn in zip(self.single_transformer_blocks, turns[count:], strict=True):
            both = block(both, mod, rotary, self.ops, turn)
        return both.part((slice(None), slice(length, None)))

    def _output(self, normal: Input) -> Tensor:
        out: Tensor = self.proj_out(normal)
        return out
