"""The FLUX.2 autoencoder over the weights of an ``AutoencoderKLFlux2`` checkpoint.

Pixels [B, 3, H, W] in [-1, 1] <-> latents [B, 128, H/p, W/p], patchified 2×2 and normalised by the checkpoint's BatchNorm
statistics, which is what the transformer sees. p is :attr:`Autoencoder.multiple`, 16 for the published models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import fused_attention

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """The architecture's numbers, as in ``vae/config.json``."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (2, 2)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> AutoencoderConfig:
        """Pick the fields that matter out of a ``config.json``."""
        known = {k: v for k, v in config.items() if k in cls.__dataclass_fields__}
        for name in ("block_out_channels", "decoder_block_out_channels", "patch_size"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        return cls(**known)


class ResnetBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, fan_in, NORM_EPS)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, fan_out, NORM_EPS)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(fan_in, fan_out, 1) if fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=not torch.is_grad_enabled()))
        y = self.conv2(F.silu(self.norm2(y), inplace=not torch.is_grad_enabled()))
        out: Tensor = y.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class MidAttention(nn.Module):
    """Self-attention over all positions, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x.view(b, c, h * w)).transpose(1, 2)
        q, k, v = (to(tokens)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](fused_attention(q, k, v)[:, 0])
        # The sum takes the memory layout of its first term, and convolutions round differently in another layout.
        return out.transpose(1, 2).reshape(b, c, h, w) + x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([MidAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Resample(nn.Module):
    """Halve (strided convolution, padded right and below) or double (nearest neighbour, then convolution)."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Doubling(nn.Module):
    """An upsampling :class:`Resample` computed at the lower resolution. Of the 3×3 neighbours that a pixel sees in the doubled
    picture, those that come from one input pixel share the sum of their weights: 2×2 weights for each of the four places that
    a pixel is doubled to, 4/9 of the multiplications, and no doubled input in memory.

    Args:
        conv: the convolution that follows the doubling.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None and conv.kernel_size == (3, 3)
        wide = conv.weight.detach().float()
        places = [both for rows in shared(wide, 2) for both in shared(rows, 3)]
        self.register_buffer("weight", torch.cat(places).to(conv.weight.dtype))
        self.register_buffer("bias", conv.bias.detach().repeat(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', 2h, 2w]."""
        h, w = x.shape[2:]
        places = F.conv2d(x, self.weight, self.bias, padding=1)
        last = places.is_contiguous(memory_format=torch.channels_last)
        out = torch.empty(
            (len(x), places.shape[1] // 4, 2 * h, 2 * w),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for i, place in enumerate(places.chunk(4, 1)):
            row, column = divmod(i, 2)
            out[:, :, row::2, column::2] = place[:, :, row : row + h, column : column + w]
        return out


def shared(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The three weights along ``dim`` as two, for the first and the second of the pixels that one is doubled to."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)


class Level(nn.Module):
    """The blocks at one resolution, then the way to the next."""

    def __init__(self, fan_in: int, fan_out: int, layers: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(fan_in if i == 0 else fan_out, fan_out, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Resample(fan_out, up=False)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Resample(fan_out, up=True)] if resample == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = c.block_out_channels, len(c.block_out_channels) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(0, i - 1)], w, c.layers_per_block, c.norm_num_groups, "down" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], c.norm_num_groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths = tuple(reversed(c.decoder_block_out_channels or c.block_out_channels))
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], c.norm_num_groups, c.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(0, i - 1)], w, c.layers_per_block + 1, c.norm_num_groups, "up" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Statistics(nn.Module):
    """The running statistics of the checkpoint's BatchNorm, per patchified latent channel."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class Autoencoder(nn.Module):
    """Encoder, decoder and the statistics between them and the transformer.

    Args:
        config: the checkpoint's architecture.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else None
        self.bn = Statistics(z * config.patch_size[0] * config.patch_size[1])

    def fold_upsampling(self) -> None:
        """Let the decoder double pictures by :class:`Doubling`, from the weights that it has now."""
        for level in self.decoder.up_blocks:
            for i, resample in enumerate(level.upsamplers):  # type: ignore[arg-type]
                level.upsamplers[i] = Doubling(resample.conv)  # type: ignore[index, operator, assignment]

    @property
    def multiple(self) -> int:
        """Pixels along one side of a transformer token; pictures are made in multiples of it."""
        return int(2 ** (len(self.config.block_out_channels) - 1) * self.config.patch_size[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [1, C, 1, 1] each, cast to ``dtype`` after the square root."""
        mean, std = self.bn.running_mean, torch.sqrt(self.bn.running_var + self.config.batch_norm_eps)
        return mean.view(1, -1, 1, 1).to(dtype), std.view(1, -1, 1, 1).to(dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels -> normalised patchified latents (the posterior's mode)."""
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        latents = patchify(moments.chunk(2, 1)[0])
        mean, std = self.statistics(latents.dtype)
        return (latents - mean) / std

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Normalised patchified latents, in the sampler's dtype, -> pixels, not yet clamped.

        Args:
            latents: [B, C, h, w].
            tile: side of a tile in pixels, where memory is short; tiles overlap by a quarter and are blended linearly.
                0 decodes whole pictures.
        """
        if tile and max(latents.shape[2:]) * self.multiple > tile:
            return self._decode_tiles(latents, max(4, tile // self.multiple))
        mean, std = self.statistics(latents.dtype)
        z = unpatchify(latents * std + mean)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        out: Tensor = self.decoder(z)
        return out

    def _decode_tiles(self, latents: Tensor, side: int) -> Tensor:
        """Tiles of side × side tokens, each weighted by a ramp towards its edges; the sum is divided by the weights' sum."""
        b, _, height, width = latents.shape
        m, overlap = self.multiple, side // 4 * self.multiple
        total = latents.new_zeros(b, self.config.out_channels, height * m, width * m, dtype=torch.float32)
        weights = total.new_zeros(1, 1, height * m, width * m)
        for y in starts(height, side):
            for x in starts(width, side):
                corner = (..., slice(y * m, (y + side) * m), slice(x * m, (x + side) * m))
                self._add_tile(latents[:, :, y : y + side, x : x + side], overlap, total[corner], weights[corner])
        return total.div_(weights).to(latents.dtype)

    def _add_tile(self, latents: Tensor, overlap: int, total: Tensor, weights: Tensor) -> None:
        """Decode a tile onto its place. Nothing of it is left when the next one is decoded."""
        part = self.decode(latents).float()
        weight = ramp(part.shape[2], overlap, part)[:, None] * ramp(part.shape[3], overlap, part)
        weights += weight
        total += part.mul_(weight)


def starts(length: int, side: int) -> list[int]:
    """Where tiles of ``side`` begin along ``length``, the last one flush with the end; they overlap by at least a quarter."""
    last = max(0, length - side)
    return [*range(0, last, side - side // 4), last]


def ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Blending weights along one side of a tile: rising over ``overlap`` pixels at either end, 1 in between."""
    place = torch.arange(length, device=like.device, dtype=torch.float32) + 0.5
    return torch.minimum(place, length - place).div(overlap).clamp(max=1)


def patchify(z: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, 4C, h, w]; the new channel order is channel, row, column."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpatchify(z: Tensor) -> Tensor:
    """[B, 4C, h, w] -> [B, C, 2h, 2w]."""
    b, c, h, w = z.shape
    return z.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
