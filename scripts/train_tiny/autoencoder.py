"""The autoencoder. 16× downsampling and 2×2 patches, so one transformer token covers 32×32 pixels.

The ``encoder`` is not trained by gradient: its weights are set so that a latent is the 32 principal components of a block
of 16×16 pixels, found level by level. So latents exist, and never change, from the first minute on. The ``decoder`` is
trained to undo that. (Trained together from random weights, the pair had 25.2 dB and weak colours after an hour on two CPU
cores; this way the decoder has 32.0 dB after six minutes, in colour.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from .data import HELD_OUT_SEED, crops
from .render import render
from .scenes import random_scene
from .trainer import Run, Trainer, averaged, load_ema, mixed, save_state

CONFIG = {
    "block_out_channels": (16, 32, 64, 96, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 1,  # a group of few channels would forget their colour
    "mid_block_add_attention": False,  # so that nothing depends on the picture's size
    "sample_size": 512,
}
BATCH = {"cpu": 3, "cuda": 16}
"""Crops per step. On a CPU time is short, and many small steps learn more in it than few large ones."""

BLOCK = 16
"""Pixels along one side of a latent."""

NOISE = 0.08
"""Standard deviation of the posterior, for latents of about unit variance: what the decoder must not mind."""

WHITENING = -0.25
"""Components are scaled by their variance to this power: halfway between pixels' own weights and all components alike,
which would make a transformer spend most of its error on fine detail."""

STEADY = 50.0
"""The encoder's last norm divides by the picture's own deviation; spare channels held at ± this make that a constant."""


class Doubled(nn.Module):
    """A decoder's upsampling, as expand and reshape: its backward is a plain sum, a quarter faster in training, and right
    when compiled (on a CPU, torch 2.13 loses the gradient of everything before a compiled nearest-neighbour upsampling)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
        return self.conv(x.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2))


def build() -> AutoencoderKLFlux2:
    """A fresh autoencoder whose residual branches start at zero, so that it starts out linear but for its last norms."""
    vae = AutoencoderKLFlux2(**CONFIG).to(memory_format=torch.channels_last)
    for block in vae.decoder.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers[0] = Doubled(block.upsamplers[0].conv)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae


def components(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of the 2×2 blocks of ``x`` [B, C, H, W]: variances [4C] falling, vectors [4C, 4C] as rows in
    the order (channel, row, column), and the mean [4C]; float64."""
    rows = F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = rows.mean(0)
    variances, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return variances.flip(0), vectors.flip(1).T, mean


def pass_on(conv: nn.Conv2d, channels: int) -> None:
    """Let the first ``channels`` channels through a convolution unchanged."""
    conv.weight[:channels], conv.bias[:channels] = 0, 0
    for i in range(channels):
        conv.weight[i, i, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1


@torch.no_grad()
def set_encoder(vae: AutoencoderKLFlux2, x: Tensor) -> None:
    """Write the principal components of ``x`` [B, 3, H, W] into the encoder: each downsampling keeps as many components
    of its 2×2 blocks as it has channels, the last one 32, turned so that all latents have about the same variance."""
    enc, latents = vae.encoder, CONFIG["latent_channels"]
    pass_on(enc.conv_in, 3)
    for level, block in enumerate(enc.down_blocks):
        channels = x.shape[1]
        if block.resnets[0].conv_shortcut is not None:
            pass_on(block.resnets[0].conv_shortcut, channels)
        if block.downsamplers is None:
            break
        conv = block.downsamplers[0].conv
        variances, vectors, mean = components(x)
        last = level == len(enc.down_blocks) - 2
        kept = latents if last else min(4 * channels, conv.out_channels)
        code = vectors[:kept]
        if last:
            turn, _ = torch.linalg.qr(
                torch.randn(kept, kept, dtype=torch.double, generator=torch.Generator().manual_seed(0))
            )
            scaled = variances[:kept] ** WHITENING
            code = turn @ (scaled[:, None] * code) / (scaled**2 * variances[:kept]).mean().sqrt()
        offset = -(code @ mean)
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[:kept, :channels, :2, :2] = code.view(kept, channels, 2, 2).float()
        conv.bias[:kept] = offset.float()
        x = F.conv2d(F.pixel_unshuffle(x, 2), code.float()[:, :, None, None], offset.float())
    # The way out is norm, SiLU, convolution: silu(a) - silu(-a) = a, so each component goes through with both signs.
    conv.weight[latents : 2 * latents] = -conv.weight[:latents]
    conv.bias[latents : 2 * latents] = -conv.bias[:latents]
    spare = conv.out_channels - 2 * latents
    conv.bias[2 * latents :] = STEADY * torch.tensor([1.0, -1.0]).repeat(spare // 2)
    deviation = ((2 * latents + spare * STEADY**2) / conv.out_channels) ** 0.5
    for layer in (enc.conv_out, vae.quant_conv):
        layer.weight.zero_()
        layer.bias.zero_()
    for i in range(latents):
        enc.conv_out.weight[i, i, 1, 1] = deviation
        enc.conv_out.weight[i, i + latents, 1, 1] = -deviation
        vae.quant_conv.weight[i, i] = 1
    vae.quant_conv.bias[latents:] = 2 * np.log(NOISE)


@torch.no_grad()
def set_decoder(vae: AutoencoderKLFlux2, x: Tensor) -> None:
    """A start for the decoder's training: orthogonal convolutions, and three channels that carry each block's mean colour
    to the output, found by least squares from the latents of ``x`` [B, 3, H, W]."""
    dec = vae.decoder

    def start(conv: nn.Conv2d, noise: float, smooth: bool) -> None:
        out, into, size, _ = conv.weight.shape
        nn.init.normal_(conv.weight, std=noise / into**0.5 if size > 1 else 0.0)
        conv.weight[:, :, size // 2, size // 2] += nn.init.orthogonal_(torch.empty(out, into))
        nn.init.zeros_(conv.bias)
        if smooth:
            line = torch.tensor([0.25, 0.5, 0.25] if size > 1 else [1.0])
            conv.weight[:3] = 0
            for i in range(3):
                conv.weight[i, i] = line[:, None] * line

    pass_on(vae.post_quant_conv, CONFIG["latent_channels"])
    start(dec.conv_in, 0.02, smooth=False)
    z = vae.encode(x).latent_dist.mean.permute(0, 2, 3, 1).flatten(0, 2)
    colour = F.avg_pool2d(x, BLOCK).permute(0, 2, 3, 1).flatten(0, 2)
    fit = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), colour).solution.T
    dec.conv_in.weight[:3] = 0
    dec.conv_in.weight[:3, :, 1, 1], dec.conv_in.bias[:3] = fit[:, :-1], fit[:, -1]
    for block in dec.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                start(resnet.conv_shortcut, 0.0, smooth=True)
        if block.upsamplers is not None:
            start(block.upsamplers[0].conv, 0.3, smooth=True)
    # The way out as in the encoder: six channels with both signs, the last four steady.
    last = dec.up_blocks[-1].resnets[0].conv_shortcut
    last.weight[6:12], last.weight[12:] = -last.weight[:6], 0
    last.bias[12:] = torch.tensor([3.0, 3.0, -3.0, -3.0])
    dec.conv_out.weight.mul_(0.3)
    dec.conv_out.weight[:, :3] = 0
    for i in range(3):
        dec.conv_out.weight[i, i, 1, 1] = 1
    dec.conv_out.weight[:, 6:12] = -dec.conv_out.weight[:, :6]
    nn.init.zeros_(dec.conv_out.bias)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae: AutoencoderKLFlux2, x: Tensor, z: Tensor) -> Tensor:
    """Of the picture ``x`` decoded from latents ``z`` [B, 32, h, w]: value, blocks' means, colour differences, edges."""
    with mixed(x.device.type):
        y = vae.decode(z).sample
    y = y.float()
    detail = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
    colour = ((y - y.roll(1, 1)) - (x - x.roll(1, 1))).abs().mean()  # brightness alone is learnt first
    broad = F.avg_pool2d(y - x, BLOCK).abs().mean()  # faint, but seen in a sky
    return (y - x).abs().mean() + 3 * F.mse_loss(y, x) + colour + 0.5 * detail + broad


def batches(run: Run, trainer: Trainer, code: Code) -> Iterator[tuple[Tensor, Tensor]]:
    """Small crops for most of the time, whole ones afterwards (the norms see more of a picture)."""
    pixels = crops(run.path("crops.npy"), 5000, run.seed)
    rng = random.Random()
    batch = BATCH[run.device]
    while True:
        size, count = (128, 2 * batch) if trainer.progress() < 0.7 else (256, batch)
        x, y = (BLOCK // 2 * rng.randrange((256 - size) // (BLOCK // 2) + 1) for _ in range(2))
        chosen = pixels[sorted(rng.sample(range(len(pixels)), count)), y : y + size, x : x + size]
        picture = to_tensor(chosen).to(run.device)
        z = code(picture)
        yield picture, z + NOISE * torch.randn_like(z)


class Code:
    """What the encoder computes, as one convolution over blocks, which is all that it is."""

    def __init__(self, vae: AutoencoderKLFlux2, x: Tensor) -> None:
        """Fit to the encoder's latents of ``x`` [B, 3, H, W].

        Raises:
            ValueError: the encoder is no linear map of blocks.
        """
        with torch.no_grad():
            rows = F.pixel_unshuffle(x, BLOCK).permute(0, 2, 3, 1).flatten(0, 2)
            z = vae.encode(x).latent_dist.mean.permute(0, 2, 3, 1).flatten(0, 2)
        mean = rows.mean(0)
        variances, vectors = torch.linalg.eigh((rows - mean).T.double() @ (rows - mean).double() / len(rows))
        there = variances > 1e-9 * variances.max()
        basis = vectors[:, there] * variances[there] ** -0.5
        inside = (rows - mean).double() @ basis
        fit = torch.linalg.lstsq(inside, (z - z.mean(0)).double()).solution
        self.weight = (basis @ fit).T.float()[:, :, None, None].to(x.device)
        self.bias = (z.mean(0) - self.weight[:, :, 0, 0] @ mean).to(x.device)
        error = float((inside @ fit - (z - z.mean(0)).double()).square().mean().sqrt())
        print(f"the encoder as one convolution: root mean square error {error:.4f}", flush=True)
        if error > NOISE:
            raise ValueError(f"the encoder is not linear: a linear map leaves an error of {error:.3f}")

    def __call__(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, 32, H/16, W/16]."""
        return F.conv2d(F.pixel_unshuffle(x, BLOCK), self.weight.to(x.device), self.bias.to(x.device))


def held_out(count: int, width: int = 512, height: int = 512) -> Tensor:
    scenes = [random_scene(random.Random(HELD_OUT_SEED + i), signs=0.4) for i in range(count)]
    return to_tensor(np.stack([np.asarray(render(s, width, height)) for s in scenes]))


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, x: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(one[None]).latent_dist.mean).sample for one in x]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB; pixel range [-1, 1]."""
    mse = (x - y).float().square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / mse)).mean())


def save_pair(run: Run, name: str, x: Tensor, y: Tensor) -> None:
    both = torch.cat([torch.cat(list(x), 2), torch.cat(list(y), 2)], 1)
    pixels = ((both.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(run.path(name))


def load(run: Run) -> AutoencoderKLFlux2:
    """The autoencoder as far as it is there: the encoder of :func:`train_encoder`, the decoder's averaged weights."""
    vae = build()
    for stage in ("encoder", "decoder"):
        if run.path(f"{stage}.safetensors").exists():
            load_ema(run.path(f"{stage}.safetensors"), vae)
    return vae


def samples(run: Run, count: int) -> Tensor:
    pixels = crops(run.path("crops.npy"), 5000, run.seed)
    return to_tensor(pixels[:: len(pixels) // count][:count])


def train_encoder(run: Run) -> None:
    vae = build()
    x = samples(run, 800)
    set_encoder(vae, x)
    parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    state = {f"ema.{k}.{n}": p.detach() for k, module in parts.items() for n, p in module.named_parameters()}
    save_state(run.path("encoder.safetensors"), state, {"step": 0, "seen": len(x)})
    Code(vae, x[:200])


def train_decoder(run: Run) -> None:
    vae = load(run)
    code = Code(vae, samples(run, 200))
    if not run.path("decoder.safetensors").exists():
        set_decoder(vae, samples(run, 200))
    vae.to(run.device)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    trainer = Trainer(run, "decoder", vae, lr=2e-3, muon=1e-2, ema=0.999)
    trainer.fit(batches(run, trainer, code), lambda x, z: loss_of(vae, x, z), reporter(run, trainer, vae))


def reporter(run: Run, trainer: Trainer, vae: AutoencoderKLFlux2) -> Callable[[int], None]:
    """A callback that prints the PSNR of held-out pictures and writes some to ``decoder.png``."""
    test = held_out(16).to(run.device)

    def report(step: int) -> None:
        with averaged(trainer):
            y = reconstruct(vae, test)
        print(f"decoder: step {step} held-out PSNR {psnr(test, y):.2f} dB", flush=True)
        save_pair(run, "decoder.png", test[:4], y[:4])

    return report
