"""A request on its way to pictures: :class:`Run`, stage by stage."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from . import images, load
from .attention import AUTO
from .candidates import PREVIEW
from .plan import Plan
from .progress import Progress, Reporter
from .request import Request
from .result import ImageFile, Result, Timings
from .version import __version__

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .pipeline import Flux2
    from .text.tokenizer import Tokens


@dataclass
class Run:
    """One request on its way through the stages."""

    flux: Flux2
    plan: Plan
    request: Request
    references: list[Image.Image]
    report: Reporter
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)

    def begin_again(self, plan: Plan) -> None:
        """Forget what a failed attempt has made, and go by another plan."""
        self.plan = plan
        self.pictures, self.seconds = [], {}
        for made in ("text", "negative", "latents"):
            self.__dict__.pop(made, None)

    def prepare(self) -> None:
        """Everything before the first denoising step: ``prompt``, ``text``, ``negative`` and ``latents``."""
        self.prompt = self.expand() if self.request.enable_prompt_expansion else self.request.prompt
        self.text, self.negative = self.encode(self.prompt)
        self.latents = self.encoded(self.references) if self.references else []

    def result(self) -> Result:
        """The painted pictures, checked and encoded."""
        checked = self.check(self.pictures)
        finished = self.finish(checked, self.prompt)
        flagged = tuple(bad for _, bad in checked)
        notes = (*self.flux.notes, *self.notes)
        return Result(finished, Timings(**self.seconds), self.seed, flagged, self.prompt, notes)

    @contextmanager
    def stage(self, name: Any, together: Sequence[Run] = ()) -> Iterator[None]:
        """Time a stage and report its beginning; on a GPU its work is waited for. Runs that share it share its seconds."""
        self.report(Progress(name))
        start = time.perf_counter()
        yield
        synchronize(self.flux._components.device)
        runs = together or (self,)
        for run in runs:
            run.seconds[name] = run.seconds.get(name, 0.0) + (time.perf_counter() - start) / len(runs)

    @property
    def seed(self) -> int:
        """Of the first picture."""
        assert self.request.seed is not None
        return self.request.seed

    def expand(self) -> str:
        from .text.expand import Expander

        flux, c = self.flux, self.flux._components
        system = load.system_messages()
        message = "SYSTEM_MESSAGE_UPSAMPLING_I2I" if self.request.images else "SYSTEM_MESSAGE_UPSAMPLING_T2I"
        with self.stage("expand"):
            if flux._expander is None:
                dtype = load.DTYPES[self.plan.dtype]
                flux._expander = Expander(flux.checkpoint.folder, c.tokenizer, c.style.parts, dtype, c.device)
            return flux._expander(self.request.prompt, system[message], self.seed)

    def encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of the prompt and, for classifier-free guidance, of the empty prompt; [1, L, joint] each."""
        from .text import encode

        c = self.flux._components
        with self.stage("encode"), c.hold_text_encoder():
            tokens = self.tokens(prompt)
            if tokens[0].cut:
                self.notes.append(
                    f"The prompt is longer than {c.style.length} tokens; what comes after them was not read."
                )
            text, *negative = (encode.embed(c.text_encoder, t, c.device) for t in tokens)
            self.notes += filter(None, c.told)
            c.told.clear()
            return text, negative[0] if negative else None

    def tokens(self, prompt: str) -> list[Tokens]:
        """The prompt and, for classifier-free guidance, the empty prompt."""
        from .text import encode

        c = self.flux._components
        guided = self.flux.checkpoint.preset.guidance == "cfg" and self.request.guidance_scale > 1
        return [encode.tokenize(c.tokenizer, [p], c.style) for p in ([prompt, ""] if guided else [prompt])]

    def encoded(self, pictures: list[Image.Image]) -> list[torch.Tensor]:
        """Latents [1, C, h, w] of the reference pictures."""
        import torch

        c = self.flux._components
        with self.stage("references"), c.hold_vae(), torch.inference_mode():
            pixels = (images.reference_pixels(p, c.vae.multiple) for p in pictures)
            return [c.vae.encode(p.to(c.device, c.vae.dtype)) for p in pixels]

    def denoise(self, shots: list[Shot], done: int, count: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """Packed latents of ``shots`` [B, N, C], all like this run's own, and their size in tokens.

        Args:
            shots: the pictures that are denoised together.
            done, count: denoisings before this one and in all, for the progress.
        """
        import torch

        from . import latents as layout
        from .sampler import Conditions, denoise
        from .schedule import make_schedule

        flux, request, c = self.flux, self.request, self.flux._components
        preset = flux.checkpoint.preset
        width, height = request.size
        grid = -(-height // c.vae.multiple), -(-width // c.vae.multiple)
        schedule = make_schedule(preset.recipe(flux.settings.variant), flux.steps(request), grid[0] * grid[1])
        noise = [layout.noise(run.seed + number, c.transformer.config.in_channels, *grid) for run, number in shots]
        positions = [
            layout.text_positions(self.text.shape[1]),
            layout.image_positions(*grid),
            layout.reference_positions([(z.shape[2], z.shape[3]) for z in self.latents]),
        ]
        conditions = Conditions(
            text=torch.cat([run.text for run, _ in shots]),
            negative=self.negative,
            guidance=request.guidance_scale,
            embedded=preset.guidance == "embedded",
            references=torch.cat([layout.pack(z) for z in self.latents], 1) if self.latents else None,
            rotary=c.transformer.rotary(torch.cat(positions).to(c.device)),
            together=self.plan.together,
            once=preset.references_once,
        )
        total = schedule.steps * count

        def on_step(step: int, _: torch.Tensor, estimate: torch.Tensor) -> None:
            synchronize(c.device)
            self.report(
                Progress("denoise", done * schedule.steps + step, total, preview=partial(self.preview, estimate, grid))
            )

        with self.stage("denoise", [run for run, _ in shots]), c.hold_transformer():
            start = layout.pack(torch.cat(noise)).to(c.device, self.text.dtype)
            return denoise(c.transformer, start, schedule, conditions, on_step, self.plan.cache), grid

    def preview(self, estimate: torch.Tensor, grid: tuple[int, int]) -> Image.Image:
        """A small picture of an estimate of the latents, at most :data:`~flux2_local.candidates.PREVIEW` tokens long."""
        import torch
        import torch.nn.functional as F

        from . import latents as layout

        c = self.flux._components
        with c.hold_vae(), torch.inference_mode():
            z = layout.unpack(estimate[:1], *grid)
            scale = PREVIEW / max(grid)
            if scale < 1:
                z = F.interpolate(z, scale_factor=scale, mode="area")
            return images.from_pixels(c.vae.decode(z.to(c.vae.dtype)))

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> Image.Image:
        """Latents -> picture of the size that was asked for."""
        import torch

        from . import latents as layout

        c = self.flux._components
        with self.stage("decode"), c.hold_vae(), torch.inference_mode():
            picture = images.from_pixels(c.vae.decode(layout.unpack(tokens, *grid), self.plan.vae_tile))
        return images.crop(picture, *self.request.size)

    def check(self, pictures: list[Image.Image]) -> list[tuple[Image.Image, bool]]:
        """Each picture with its flag; flagged ones blackened."""
        checker = self.flux._checker
        if not self.request.enable_safety_checker or checker is None:
            return [(picture, False) for picture in pictures]
        with self.stage("safety"):
            flags = [checker(picture) for picture in pictures]
        return [(images.black(p) if bad else p, bad) for p, bad in zip(pictures, flags, strict=True)]

    def finish(self, checked: list[tuple[Image.Image, bool]], prompt: str) -> tuple[ImageFile, ...]:
        """Encode the pictures with their settings inside."""
        request = self.request
        out = []
        with self.stage("finish"):
            for number, (picture, _) in enumerate(checked):
                seed = self.seed + number
                settings = self.settings(seed, prompt)
                data = images.encode(picture, request.output_format, settings)
                name = f"{slug(request.prompt)}-{seed}{images.SUFFIXES[request.output_format]}"
                kind = images.CONTENT_TYPES[request.output_format]
                out.append(ImageFile(data, picture.width, picture.height, kind, name, settings))
        return tuple(out)

    def settings(self, seed: int, prompt: str) -> dict[str, Any]:
        """What a picture's metadata says: enough to make it again."""
        flux, request = self.flux, self.request
        fields = request.model_dump(
            exclude={"images", "seed", "num_images", "sync_mode", "acceleration"}, exclude_none=True
        )
        settings = {
            "version": __version__,
            "model": flux.checkpoint.source,
            "variant": flux.settings.variant,
            "acceleration": self.plan.acceleration,
            "dtype": self.plan.dtype,
            "seed": seed,
            "steps": flux.steps(request),
            **fields,
        }
        if prompt != request.prompt:
            settings["expanded_prompt"] = prompt
        if self.plan.transformer.format != self.plan.dtype:
            settings["quantize"] = self.plan.transformer.format
        if flux.settings.attention != AUTO:
            settings["attention"] = flux.settings.attention
        if flux.settings.adapters:
            settings["lora"] = [[str(a.path), a.strength] for a in flux.settings.adapters]
        if request.images:
            settings["images"] = [
                s if isinstance(s, str) and not s.startswith("data:") else str(type(s).__name__) for s in request.images
            ]
        return settings


Shot = tuple[Run, int]
"""A picture to denoise: whose it is, and which of them."""


def paint(runs: list[Run]) -> None:
    """Denoise and decode every picture of prepared runs that are alike, as many together as the plan says."""
    shots = [(run, number) for run in runs for number in range(run.request.num_images)]
    size = runs[0].plan.batch
    parts = [shots[i : i + size] for i in range(0, len(shots), size)]
    for done, part in enumerate(parts):
        tokens, grid = runs[0].denoise(part, done, len(parts))
        for (run, _), own in zip(part, tokens.split(1), strict=True):
            run.pictures.append(run.decode(own, grid))


def slug(prompt: str) -> str:
    """A file name's worth of a prompt."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:48].rstrip("-") or "image"


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, where it has one."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
