"""A loaded model and what it does with a request: :class:`Flux2`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import images, load, lora, safety, store
from .attention import AUTO
from .candidates import SYSTEM_RESERVE, Need
from .ceiling import Ceiling
from .costs import Work
from .errors import BackendUnavailableError, BudgetError, Flux2Error, OutOfMemoryError, is_out_of_memory
from .hardware import Hardware
from .plan import Plan, built
from .presets import devices, show_bytes, tiers
from .progress import CancelCheck, OnProgress, Reporter
from .request import Acceleration, Request, Variant, make_request
from .result import Result
from .settings import LoraSource, Settings, choose, hardware_to_use, make_settings
from .stages import Run, chat_tokens, paint

if TYPE_CHECKING:
    from PIL import Image

    from .store import Checkpoint

LESS = 0.8
"""Share of a plan's peak that the next one may have where the memory ran out."""

NO_ENGINE = "unable to find an engine"
"""What torch says of a convolution where none of cuDNN's ways got its workspace, or where there is none: less memory is tried, and if
that fails too, no more is said than this."""

T = TypeVar("T")


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
        budget = None if settings.vram is None else settings.vram - SYSTEM_RESERVE[hardware.kind]
        self._ceiling = Ceiling(hardware, budget)
        self.notes = (*model_notes(checkpoint, settings.variant), *self._load())
        self._turn = threading.Lock()
        self._checker: safety.Checker | None = None

    def _load(self) -> tuple[str, ...]:
        """Bring the weights as the plan says; what to tell the user about it.

        Raises:
            Flux2Error: as :func:`flux2_local.load.build`.
            OutOfMemoryError: the device's memory ran out, and with a plan that needs less it did again, or there is none.
        """

        def attempt() -> load.Components:
            with self._ceiling():
                return self._build(self.plan)

        def again() -> Plan:
            self.plan = self.settings.plan(self._need_of(self.plan), self.hardware)
            return self.plan

        self._components, notes = self._with_less(attempt, self.plan, again)
        self._built = built(self.plan)
        return *notes, *self._components.notes

    def _build(
        self, plan: Plan, before: load.Components | None = None, parts: Collection[str] = load.PARTS
    ) -> load.Components:
        path = store.require_lora(self.checkpoint, self.settings.variant)
        own = (lora.Lora(path),) if path is not None else ()
        adapters = (*own, *self.settings.adapters)
        return load.build(plan, self.checkpoint, self.hardware, adapters, self.settings.keep_prompts, before, parts)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        variant: Variant = "standard",
        *,
        acceleration: Acceleration = "regular",
        vram: str | float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str = "auto",
        lora: LoraSource | list[LoraSource] | None = None,
        base: str | Path | None = None,
        attention: str = AUTO,
        compile: bool | None = None,  # noqa: A002
        keep_prompts: bool = False,
        requests: int = 1,
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
                compiled is kept for the next process. None leaves it to the plan, which weighs it for so many ``requests``.
            keep_prompts: keep prompts' embeddings in the user's cache folder (not the prompts, and at most 1 GiB), and read the
                text encoder only for a prompt that is not among them: the next process draws it sooner.
            requests: about how many pictures are to come.

        Raises:
            RequestError: an argument that is none of its allowed values.
            ModelError: the model is unknown, missing or damaged.
            PlanError: the device is not there, the attention backend cannot be used, or the model does not fit.
        """
        settings = make_settings(
            variant,
            acceleration,
            vram=vram,
            dtype=dtype,
            lora=lora,
            attention=attention,
            quantize=quantize,
            compile=compile,
            keep_prompts=keep_prompts,
            requests=requests,
        )
        hardware = hardware_to_use(device, settings)
        if hardware.device in devices():
            raise BackendUnavailableError(
                f"{hardware.device} is a card's description, good for `flux2-local plan` only. Leave device out to use what is here."
            )
        checkpoint, plan = choose(model, settings, hardware, Work(), base)
        settings = replace(settings, settled=next(choice for choice in plan.choices if choice.what == "compile"))
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
        fields = {**prompt.given(), **fields} if isinstance(prompt, Request) else {"prompt": prompt, **fields}
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

        def again() -> Plan:
            for run in runs:
                run.begin_again(self._plan_for(run.request, run.references))
            return runs[0].plan

        results, notes = self._with_less(lambda: self._attempt(runs, around), runs[0].plan, again)
        return [replace(result, notes=(*result.notes, *notes)) for result in results]

    def _with_less(self, attempt: Callable[[], T], failed: Plan, again: Callable[[], Plan]) -> tuple[T, list[str]]:
        """What ``attempt`` gives, and what to tell the user; where the device's memory runs out, of a second one.

        Args:
            attempt: goes by the plan ``failed``, then by that of ``again``.
            again: plans within settings that allow less.

        Raises:
            OutOfMemoryError: it ran out twice, or nothing needs less.
        """
        try:
            return attempt(), []
        except Exception as error:
            if not is_out_of_memory(error) and NO_ENGINE not in str(error):
                raise
            cause = str(error)
        # Outside the handler: the traceback would keep the first attempt's tensors.
        less, note = self._plan_for_less(failed, again, cause)
        gc.collect()  # what it has left may refer to itself, as compiled blocks do
        try:
            return attempt(), [note]
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(less) from error
            raise

    def _attempt(self, runs: list[Run], around: Callable[[], AbstractContextManager[None]]) -> list[Result]:
        with self._turn, self._ceiling():
            runs[0].notes += self._adopt(runs[0].plan)
            with around():
                for run in runs:
                    run.prepare()
                    if len(runs) > run.plan.batch:
                        run.wait(runs[0])
                paint(runs)
                return [run.result() for run in runs]

    def _plan_for_less(self, failed: Plan, again: Callable[[], Plan], cause: str) -> tuple[Plan, str]:
        """What ``again`` plans, as whatever follows, within :data:`LESS` of the memory that was not there; what to tell the user.

        Raises:
            OutOfMemoryError: nothing needs so little.
        """
        budget = int(LESS * failed.peak_bytes) + SYSTEM_RESERVE[self.hardware.kind]
        settings = self.settings
        self.settings = replace(settings, vram=budget)
        try:
            plan = again()
        except BudgetError:
            self.settings = settings
            raise self._out_of_memory(failed) from RuntimeError(cause)
        placement = next(choice.value for choice in plan.choices if choice.what == "placement")
        return plan, (
            f"The memory of {self.hardware.name} ran out, and {show_bytes(failed.peak_bytes)} had been planned for: something else "
            f"uses it, or more was needed. From here on plans stay within {show_bytes(budget)}; this one: {placement}."
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
        """Load again what ``plan`` has in another form; what to tell the user about it."""
        wanted, had = built(plan), self._built
        parts = [name for name, form in wanted.items() if form != had.get(name)]
        if not parts:
            load.settle(self._components, plan)
            return []
        # The old weights leave before the new ones come, which may fail.
        self._built = {name: form for name, form in had.items() if name not in parts}
        self._components = load.emptied(self._components, parts)
        gc.collect()  # compiled blocks refer to themselves
        self._components = self._build(plan, self._components, parts)
        load.settle(self._components, plan)
        self.plan, self._built = plan, wanted
        again = [f"{name}: {changes(had.get(name), wanted[name])}" for name in parts if name != "operations"]
        if not again:
            return []
        return [f"Loaded again for this request: {'; '.join(again)}.", *self._components.notes]

    def _need(self, request: Request, acceleration: Acceleration) -> Need:
        width, height = request.size
        arch = load.architecture(self.checkpoint)
        steps = self.steps(request)
        work = Work(width, height, steps, request.num_images, chat=chat_tokens(self, request))
        return Need(self.checkpoint.name, self.settings.variant, tiers()[acceleration], arch, work)

    def steps(self, request: Request) -> int:
        """Denoising steps of a request: its own number, or the variant's."""
        return request.num_inference_steps or self.checkpoint.preset.recipe(self.settings.variant).steps

    def _need_of(self, plan: Plan) -> Need:
        """What ``plan`` was made for."""
        return Need(plan.model, plan.variant, tiers()[plan.acceleration], load.architecture(self.checkpoint), plan.work)

    def _out_of_memory(self, failed: Plan) -> OutOfMemoryError:
        smaller = f"--vram {max(2, int(failed.peak_bytes * 0.7 / 2**30))}GiB"
        try:
            peak = replace(self.settings, vram=None).plan(self._need_of(failed), self.hardware).peak_bytes
            wanted = f"about {peak / 2**30:.1f} GiB were expected to be enough"
        except BudgetError as error:
            wanted = str(error)
        size = f"{failed.work.width}×{failed.work.height}"
        return OutOfMemoryError(
            f"The memory of {self.hardware.name} ran out at {size} ({wanted}). Close what else uses it, ask for a smaller picture, "
            f"or plan for less: load again with {smaller}."
        )


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


def changes(before: tuple[str, ...] | None, after: tuple[str, ...]) -> str:
    """What is different about a part of the model that has been loaded again, in words."""
    if before is None:
        return "loading it in another form had failed"
    return ", ".join(f"{new} instead of {old}" for old, new in zip(before, after, strict=False) if new != old)
