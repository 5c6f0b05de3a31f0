"""A loaded model and what it does with a request: :class:`Flux2`."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import images, load, lora, quant, safety, store
from .attention import AUTO, NAMES
from .candidates import PREVIEW, SYSTEM_RESERVE, Need
from .costs import Work
from .errors import BackendUnavailableError, BudgetError, Flux2Error, OutOfMemoryError, RequestError
from .hardware import Hardware, from_preset, probe
from .plan import Plan, built, make_plan
from .presets import devices, parse_bytes, show_bytes, tiers
from .progress import CancelCheck, OnProgress, Progress, Reporter
from .request import ACCELERATIONS, VARIANTS, Acceleration, Request, Variant, make_request
from .result import ImageFile, Result, Timings
from .version import __version__

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .store import Checkpoint
    from .text.expand import Expander
    from .text.tokenizer import Tokens

LoraSource = str | Path | tuple[str | Path, float]
"""A LoRA: a file's path or "owner/name:file", alone or with its strength."""


LESS = 0.8
"""Share of a plan's peak that the next one may have where the memory ran out."""


@dataclass(frozen=True)
class Settings:
    """What :meth:`Flux2.load` was asked for, checked.

    Attributes:
        variant, acceleration: of every request, unless a request names another acceleration.
        vram: bytes of device memory that may be used, or None.
        dtype: compute type insisted on, or None.
        adapters: the user's LoRAs.
        attention: "auto", or the attention backend insisted on.
        quantize: "auto", "none" or the format that the weights are to have.
        compiled: whether torch.compile is to be used, or None to leave it to the plan.
        keep_prompts: whether prompts' embeddings are kept on disk.
    """

    variant: Variant
    acceleration: Acceleration
    vram: int | None
    dtype: str | None
    adapters: tuple[lora.Lora, ...]
    attention: str = AUTO
    quantize: str = "auto"
    compiled: bool | None = None
    keep_prompts: bool = False

    def plan(self, need: Need, hardware: Hardware) -> Plan:
        """How ``need`` is met within these settings.

        Raises:
            BackendUnavailableError: something insisted on cannot be used.
            BudgetError: nothing fits.
        """
        return make_plan(need, hardware, self.vram, self.dtype, self.attention, self.quantize, self.compiled)


class Flux2:
    """A FLUX.2 model on this machine. Make one with :meth:`load`.

    Attributes:
        plan: what was chosen, and why; ``print(flux.plan)`` explains it.
        checkpoint: the model's files.
        notes: what the user should know about this model and variant, a line each.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, hardware: Hardware, settings: Settings) -> None:
        """Load the weights. Use :meth:`load`, which makes the plan."""
        self.plan, self.checkpoint, self.hardware, self.settings = plan, checkpoint, hardware, settings
        self._components = self._build(plan)
        self.notes = (*model_notes(checkpoint, settings.variant), *self._components.notes)
        self._turn = threading.Lock()
        self._checker: safety.Checker | None = None
        self._expander: Expander | None = None

    def _build(self, plan: Plan) -> load.Components:
        path = store.require_lora(self.checkpoint, self.settings.variant)
        own = (lora.Lora(path),) if path is not None else ()
        adapters = (*own, *self.settings.adapters)
        return load.build(plan, self.checkpoint, self.hardware, adapters, self.settings.keep_prompts)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        variant: Variant = "standard",
        *,
        acceleration: Acceleration = "regular",
        vram: str | int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str = "auto",
        lora: LoraSource | list[LoraSource] | None = None,
        base: str | Path | None = None,
        attention: str = AUTO,
        compile: bool | None = None,  # noqa: A002
        keep_prompts: bool = False,
    ) -> Flux2:
        """Find a model, plan for this machine and load it. Nothing is downloaded.

        Args:
            model: a name (``flux2-local models`` lists them), a hub id, a folder in the hub layout, or a .safetensors or
                .gguf file. None: the best one on this disk that fits, else the bundled one.
            variant: "standard", "turbo" or "flash".
            acceleration: "none", "regular" or "high".
            vram: device memory that may be used, such as "12GiB" or bytes; what is free where None.
            device: "cuda", "cuda:1", "cpu" or "mps"; the best there is where None.
            dtype: "float32", "bfloat16" or "float16", to insist on a compute type.
            quantize: "auto" (where memory demands it or it was measured faster), "none", "builtin", or a format by name, to
                insist on it; a wrong name lists them.
            lora: LoRA files to merge in: a path or "owner/name:file", or (that, strength), or a list of them.
            base: for a single file, the model whose text encoder and autoencoder go with it.
            attention: a backend of :mod:`flux2_local.attention` to insist on; "auto" takes the fastest that the tier permits.
            compile: True has torch.compile take the transformer's blocks: slow to start, worth it for hundreds of pictures; what is
                compiled is kept for the next process. None leaves it to the plan.
            keep_prompts: keep prompts' embeddings in the user's cache folder (not the prompts, and at most 1 GiB), and read the
                text encoder only for a prompt that is not among them: the next process draws it sooner.

        Raises:
            RequestError: an argument that is none of its allowed values.
            ModelError: the model is unknown, missing or damaged.
            PlanError: the device is not there, the attention backend cannot be used, or the model does not fit.
        """
        settings = make_settings(variant, acceleration, vram, dtype, lora, attention, quantize, compile)
        settings = replace(settings, keep_prompts=keep_prompts)
        hardware = find_hardware(device)
        if hardware.device in devices():
            raise BackendUnavailableError(
                f"{hardware.device} is a card's description, good for `flux2-local plan` only. Leave device out to use what is here."
            )
        checkpoint, plan = choose(model, settings, hardware, Work(), base)
        return cls(plan, checkpoint, hardware, settings)

    def generate(
        self,
        prompt: str | Request,
        *,
        progress: OnProgress | None = None,
        cancel: CancelCheck | None = None,
        **fields: Any,
    ) -> Result:
        """Turn a prompt into pictures. Threads that share a model take turns.

        Args:
            prompt: what to draw, or a whole :class:`Request`.
            progress: called with every :class:`Progress`.
            cancel: asked between steps; True stops.
            fields: the other fields of :class:`Request`, by name.

        Raises:
            RequestError: a field is wrong, or asks for what this model was not loaded for.
            SafetyUnavailableError: the safety check is on and there is no classifier.
            OutOfMemoryError: the device's memory ran out.
            Cancelled: the cancel callback said so.
        """
        if isinstance(prompt, Request):
            fields = {**{k: getattr(prompt, k) for k in prompt.model_fields_set}, **fields}
        else:
            fields = {"prompt": prompt, **fields}
        run = self._run(fields, Reporter(progress, cancel))
        return self._work([run])[0]

    def _run(self, fields: dict[str, Any], report: Reporter) -> Run:
        """A request, checked and planned.

        Raises:
            Flux2Error: as :meth:`generate`.
        """
        request = make_request(self.settings.variant, fields).seeded()
        references = images.references(request.images)
        plan = self._plan_for(request, references)
        if request.enable_safety_checker and self.checkpoint.preset.harmless is None and self._checker is None:
            self._checker = safety.make_checker()
        return Run(self, plan, request, references, report)

    def _work(self, runs: list[Run], around: Callable[[], AbstractContextManager[None]] = nullcontext) -> list[Result]:
        """Take requests that run alike through the stages, when it is their turn; where the device's memory runs out, once more
        with a plan that needs less.

        Args:
            runs: at least one.
            around: entered around the stages, once the weights are as the plan says.

        Raises:
            Flux2Error: as :meth:`generate`.
        """
        try:
            return self._attempt(runs, around)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error)
        # Outside the handler: the traceback would keep the first attempt's tensors.
        note = self._plan_for_less(runs, cause)
        try:
            results = self._attempt(runs, around)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(runs[0].request) from error
            raise
        return [replace(result, notes=(*result.notes, note)) for result in results]

    def _attempt(self, runs: list[Run], around: Callable[[], AbstractContextManager[None]]) -> list[Result]:
        with self._turn:
            runs[0].notes += self._adopt(runs[0].plan)
            with around():
                for run in runs:
                    run.prepare()
                paint(runs)
                return [run.result() for run in runs]

    def _plan_for_less(self, runs: list[Run], cause: str) -> str:
        """Plan ``runs``, and whatever follows, within :data:`LESS` of the memory that was not there; what to tell the user.

        Raises:
            OutOfMemoryError: nothing needs so little.
        """
        failed = runs[0].plan
        budget = int(LESS * failed.peak_bytes) + SYSTEM_RESERVE[self.hardware.kind]
        settings = self.settings
        self.settings = replace(settings, vram=budget)
        try:
            for run in runs:
                run.begin_again(self._plan_for(run.request, run.references))
        except BudgetError:
            self.settings = settings
            raise self._out_of_memory(runs[0].request) from RuntimeError(cause)
        placement = next(choice.value for choice in runs[0].plan.choices if choice.what == "placement")
        return (
            f"The memory of {self.hardware.name} ran out, and {show_bytes(failed.peak_bytes)} had been planned for: something else "
            f"uses it. From here on plans stay within {show_bytes(budget)}; this one: {placement}."
        )

    def generate_many(
        self,
        requests: Iterable[str | dict[str, Any] | Request],
        *,
        job_seed: int = 0,
        return_errors: bool = False,
        progress: OnProgress | None = None,
        cancel: CancelCheck | None = None,
    ) -> Iterator[Result | Flux2Error]:
        """One result per request, in order, made as they are asked for. Prompts that come again soon are encoded once.

        Requests of one size, guidance, number of steps and acceleration that follow each other are denoised together where
        the plan says that it pays, and the prompts of the next ones are encoded meanwhile.

        Args:
            requests: prompts, fields by name, or whole requests; read a few ahead of the results.
            job_seed: a request without a seed gets one that follows from this and its position, so that the same
                requests give the same pictures every time.
            return_errors: give the error in place of the result of a request that is wrong or does not fit, and go on.
            progress, cancel: as :meth:`generate`.

        Raises:
            Flux2Error: as :meth:`generate`; with ``return_errors`` only what ends all requests alike.
        """
        from . import many

        report = Reporter(progress, cancel)
        given = many.read(self, requests, job_seed, report)
        for result in many.results(self, many.grouped(given, many.request_of, many.batch_of)):
            if isinstance(result, Flux2Error) and not return_errors:
                raise result
            yield result

    def _plan_for(self, request: Request, references: list[Image.Image]) -> Plan:
        """How this request runs: its size, references and acceleration may ask for more than the weights were loaded for.

        Raises:
            BudgetError: it does not fit.
        """
        need = self._need(request, request.acceleration or self.settings.acceleration)
        sizes = tuple(images.reference_size(*picture.size, need.arch.multiple) for picture in references)
        return self.settings.plan(replace(need, work=replace(need.work, references=sizes)), self.hardware)

    def _adopt(self, plan: Plan) -> list[str]:
        """Load the weights again where ``plan`` holds them in another form; what to tell the user about it."""
        if built(plan) == built(self.plan):
            load.settle(self._components, plan)
            return []
        before, self.plan = self.plan, plan
        del self._components  # the old weights leave before the new ones come
        self._components = self._build(plan)
        self._expander = None
        changed = ", ".join(f"{a} instead of {b}" for a, b in zip(forms(plan), forms(before), strict=True) if a != b)
        return [f"The weights were loaded again for this request: {changed}.", *self._components.notes]

    def _need(self, request: Request, acceleration: Acceleration) -> Need:
        width, height = request.size
        arch = load.architecture(self.checkpoint)
        steps = self.steps(request)
        tier = tiers()[acceleration]
        return Need(
            self.checkpoint.name, self.settings.variant, tier, arch, Work(width, height, steps, request.num_images)
        )

    def steps(self, request: Request) -> int:
        """Denoising steps of a request: its own number, or the variant's."""
        return request.num_inference_steps or self.checkpoint.preset.recipe(self.settings.variant).steps

    def _out_of_memory(self, request: Request) -> OutOfMemoryError:
        width, height = request.size
        need = self._need(request, request.acceleration or self.settings.acceleration)
        smaller = f"--vram {max(2, int(self.plan.peak_bytes * 0.7 / 2**30))}GiB"
        try:
            peak = replace(self.settings, vram=None).plan(need, self.hardware).peak_bytes
            wanted = f"about {peak / 2**30:.1f} GiB were expected to be enough"
        except BudgetError as error:
            wanted = str(error)
        return OutOfMemoryError(
            f"The memory of {self.hardware.name} ran out at {width}×{height} ({wanted}). Close what else uses it, ask for a "
            f"smaller picture, or plan for less: load again with {smaller}."
        )


def make_settings(
    variant: str,
    acceleration: str,
    vram: str | int | None,
    dtype: str | None,
    adapters: LoraSource | list[LoraSource] | None,
    attention: str = AUTO,
    quantize: str = "auto",
    compiled: bool | None = None,
) -> Settings:
    """Check the arguments of :meth:`Flux2.load`.

    Raises:
        RequestError: naming the argument, what was given and what is allowed.
    """
    for name, value, allowed in (
        ("variant", variant, VARIANTS),
        ("acceleration", acceleration, ACCELERATIONS),
        ("dtype", dtype, (None, *load.DTYPES)),
        ("attention", attention, NAMES),
        ("quantize", quantize, quant.NAMES),
    ):
        if value not in allowed:
            words = ", ".join(str(a) for a in allowed if a is not None)
            raise RequestError(f"{name} must be one of {words}; {value!r} was given.")
    try:
        budget = None if vram is None else parse_bytes(vram)
    except ValueError as error:
        raise RequestError(f"vram: {error}") from None
    given = adapters if isinstance(adapters, list) else [] if adapters is None else [adapters]
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in given]
    found = tuple(lora.Lora(lora.load(source), float(strength)) for source, strength in pairs)
    return Settings(variant, acceleration, budget, dtype, found, attention, quantize, compiled)  # type: ignore[arg-type]


def find_hardware(device: str | None, ram: int | None = None) -> Hardware:
    """This machine's hardware, or the one that a preset of ``devices.toml`` describes."""
    if device is not None and device.split(":")[0] not in ("cuda", "cpu", "mps"):
        return from_preset(device, ram)
    return probe(device)


def choose(
    model: str | Path | None, settings: Settings, hardware: Hardware, work: Work, base: str | Path | None = None
) -> tuple[Checkpoint, Plan]:
    """The model to use and its plan. With no model named, the best one on this disk that fits.

    Raises:
        ModelError, PlanError: as :meth:`Flux2.load`.
    """
    named = model is not None
    found = [store.find(model, settings.variant, base)] if named else list(store.candidates(settings.variant))
    refused: BudgetError | None = None
    for checkpoint in found:
        recipe = checkpoint.preset.recipe(settings.variant)
        need = Need(
            checkpoint.name,
            settings.variant,
            tiers()[settings.acceleration],
            load.architecture(checkpoint),
            replace(work, steps=recipe.steps),
        )
        try:
            return checkpoint, settings.plan(need, hardware)
        except BudgetError as error:
            refused = error
    assert refused is not None, "the bundled model is always a candidate"
    raise refused


def model_notes(checkpoint: Checkpoint, variant: Variant) -> tuple[str, ...]:
    """What the user should know about a model and variant."""
    notes = []
    if checkpoint.bundled:
        notes.append(
            "This is the small model that comes with the package: it draws simple scenes. For FLUX.2 itself run "
            "`flux2-local models`, then for example `flux2-local download klein-4b`."
        )
    recipe = checkpoint.preset.recipe(variant)
    if recipe.note:
        notes.append(f"{checkpoint.preset.title}, {variant}: {recipe.note}.")
    return tuple(notes)


def forms(plan: Plan) -> tuple[str, ...]:
    """What :func:`built` compares, in words that a user reads."""
    layout = "channels-last convolutions" if plan.channels_last else "convolutions as stored"
    held = plan.transformer.format, f"{plan.transformer.placement} weights", layout
    return *held, f"{plan.attention} attention", f"{plan.ops} operations"


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


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
