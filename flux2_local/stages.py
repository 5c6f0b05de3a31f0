"""A request on its way to pictures: :class:`Run`, stage by stage."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import images, load
from .attention import AUTO
from .candidates import PREVIEW
from .costs import CHAT_STEP
from .plan import Plan
from .progress import Progress, Reporter
from .request import Request
from .result import ImageFile, Result, Timings
from .version import __version__

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .pipeline import Flux2
    from .sampler import Prepared
    from .schedule import Schedule
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

    def wait(self, lead: Run) -> None:
        """Let the prompt's embedding be in host memory until it is its turn; the empty prompt's is ``lead``'s for all."""
        self.text = self.text.cpu()
        if self is not lead:
            self.negative = None

    def result(self) -> Result:
        """The painted pictures, checked and encoded."""
        checked = self.check(self.pictures)
        finished = self.finish(checked, self.prompt)
        flagged = tuple(bad for _, bad in checked)
        notes = (*self.flux.notes, *self.notes)
        return Result(finished, Timings(**self.seconds), self.seed, flagged, self.prompt, notes, self.plan)

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
        """The prompt, rewritten."""
        from .text.expand import Expander, Sampling
        from .text.memory import forgetting

        checkpoint, c = self.flux.checkpoint, forgetting(self.flux._components)
        sampling = Sampling.of(checkpoint.folder)
        with self.stage("expand"), c.hold_text_encoder(), load.remainder(self.plan, checkpoint, c) as remainder:
            expander = Expander(c.text_encoder, remainder, c.tokenizer, c.style.parts, sampling, self.report.stop)
            return expander(self.request.prompt, system_message(self.request), self.seed)

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
            self.notes += dict.fromkeys(filter(None, c.told))
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

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's tokens."""
        width, height = self.request.size
        multiple = self.flux._components.vae.multiple
        return -(-height // multiple), -(-width // multiple)

    @property
    def schedule(self) -> Schedule:
        """Noise levels."""
        from .schedule import make_schedule

        flux, (rows, columns) = self.flux, self.grid
        recipe = flux.checkpoint.preset.recipe(flux.settings.variant)
        return make_schedule(recipe, flux.steps(self.request), rows * columns)

    def denoise(
        self, shots: list[Shot], prepared: Prepared | None, done: int, count: int
    ) -> tuple[torch.Tensor, Prepared]:
        """Packed latents of ``shots`` [B, N, C], all like this run's own. The transformer is on the device.

        Args:
            shots: the pictures that are denoised together.
            prepared: what the denoising before this one gave beside its latents, or None.
            done, count: denoisings before this one and in all, for the progress.
        """
        import torch

        from . import latents as layout
        from .sampler import Conditions, denoise, prepare

        flux, request, c = self.flux, self.request, self.flux._components
        preset, grid, schedule = flux.checkpoint.preset, self.grid, self.schedule
        noise = [layout.noise(run.seed + number, c.transformer.config.in_channels, *grid) for run, number in shots]
        positions = [
            layout.text_positions(self.text.shape[1]),
            layout.image_positions(*grid),
            layout.reference_positions([(z.shape[2], z.shape[3]) for z in self.latents]),
        ]
        conditions = Conditions(
            text=torch.cat([run.text for run, _ in shots]).to(c.device),
            negative=self.negative,
            guidance=request.guidance_scale,
            embedded=preset.guidance == "embedded",
            references=torch.cat([layout.pack(z) for z in self.latents], 1) if self.latents else None,
            rotary=c.transformer.rotary(torch.cat(positions).to(c.device)),
            together=self.plan.together,
            once=preset.references_once,
        )
        prepared = prepared or prepare(c.transformer, schedule, conditions)
        conditions = replace(conditions, prepared=prepared)
        total = schedule.steps * count

        def on_step(step: int, _: torch.Tensor, estimate: torch.Tensor) -> None:
            synchronize(c.device)
            self.report(
                Progress("denoise", done * schedule.steps + step, total, preview=partial(self.preview, estimate))
            )

        start = layout.pack(torch.cat(noise)).to(c.device, self.text.dtype)
        return denoise(c.transformer, start, schedule, conditions, on_step, self.plan.cache), prepared

    def preview(self, estimate: torch.Tensor) -> Image.Image:
        """A small picture of an estimate of the latents, at most :data:`~flux2_local.candidates.PREVIEW` tokens long."""
        import torch
        import torch.nn.functional as F

        from . import latents as layout

        c = self.flux._components
        with c.hold_vae(), torch.inference_mode():
            z = layout.unpack(estimate[:1], *self.grid)
            scale = PREVIEW / max(self.grid)
            if scale < 1:
                z = F.interpolate(z, scale_factor=scale, mode="area")
            return images.from_pixels(c.vae.decode(z.to(c.vae.dtype)))

    def decode(self, tokens: torch.Tensor) -> Image.Image:
        """Latents -> picture of the size that was asked for. The autoencoder is on the device."""
        import torch

        from . import latents as layout

        c = self.flux._components
        with torch.inference_mode():
            picture = images.from_pixels(c.vae.decode(layout.unpack(tokens, *self.grid), self.plan.vae_tile))
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
        if request.enable_prompt_expansion:
            settings["expanded_prompt"] = prompt
        if flux.checkpoint.single is not None:
            settings["base"] = str(flux.checkpoint.folder)
        if self.plan.transformer.format != self.plan.dtype:
            settings["quantize"] = self.plan.transformer.format
        if flux.settings.attention != AUTO:
            settings["attention"] = flux.settings.attention
        if flux.settings.adapters:
            settings["lora"] = [[str(a.path), a.strength] for a in flux.settings.adapters]
        if request.images:
            settings["images"] = [
                str(s) if isinstance(s, (str, Path)) and images.scheme_of(s) != "data" else type(s).__name__
                for s in request.images
            ]
        return settings


Shot = tuple[Run, int]
"""A picture to denoise: whose it is, and which of them."""


def paint(runs: list[Run]) -> None:
    """Denoise every picture of prepared runs that are alike, as many together as the plan says, then decode them: each network's
    weights come once for all."""
    lead, shots = runs[0], [(run, number) for run in runs for number in range(run.request.num_images)]
    c, size, owners = lead.flux._components, lead.plan.batch, [run for run, _ in shots]
    parts = [shots[i : i + size] for i in range(0, len(shots), size)]
    with lead.stage("denoise", owners), c.hold_transformer():
        latents, prepared = [], None
        for done, part in enumerate(parts):
            made, prepared = lead.denoise(part, prepared, done, len(parts))
            latents += made.split(1)
        del prepared
    with lead.stage("decode", owners), c.hold_vae():
        for run, own in zip(owners, latents, strict=True):
            run.pictures.append(run.decode(own))
            lead.report.stop()


def chat_tokens(flux: Flux2, request: Request) -> int:
    """Tokens that the language model reads to expand the request's prompt, rounded up; 0 where it does not."""
    from .text.expand import chat

    if not request.enable_prompt_expansion:
        return 0
    c = flux._components
    count = chat(c.tokenizer, c.style.parts, request.prompt, system_message(request)).ids.shape[1]
    return -(-count // CHAT_STEP) * CHAT_STEP


def system_message(request: Request) -> str:
    """What the model makers tell the language model that expands a prompt."""
    kind = "I2I" if request.images else "T2I"
    return load.system_messages()[f"SYSTEM_MESSAGE_UPSAMPLING_{kind}"]


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
