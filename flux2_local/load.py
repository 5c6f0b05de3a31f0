"""Plan + checkpoint -> :class:`Components`. The only module that changes modules."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import attention, heap, weights
from . import lora as loras
from .costs import Architecture
from .errors import OutputError
from .files import write
from .hardware import Hardware, torch_device, widens_attention
from .model import kernels
from .model.autoencoder import Autoencoder, AutoencoderConfig
from .model.blocks import SCHEDULE
from .model.compiled import compile_blocks, mark
from .model.language import LanguageConfig, LanguageModel, Remainder
from .model.meta import meta
from .model.native import NATIVE
from .model.ops import REFERENCE, Ops, widen
from .model.transformer import Flux2Transformer, TransformerConfig
from .offload import Hold, Later, adapt, place, release
from .quant import convert, disk
from .quant.recipe import Recipe
from .single import read as read_single
from .text.encode import PromptStyle
from .text.kept import KeptPrompts
from .text.memory import forgetting, remembering
from .text.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from .lora import Lora
    from .plan import ComponentPlan, Plan
    from .store import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLES = {"reference": REFERENCE, "native": NATIVE}
KEPT_FLOAT32 = ("bn.",)
"""The autoencoder's statistics keep their own type: they are few and the pipelines' arithmetic starts from them."""

LAYER = re.compile(r"^(?:language_model\.model|model\.language_model|model)\.(layers\.\d+\..+|embed_tokens\.weight)$")
"""Names of a text encoder's tensors in the layouts that transformers has written over time."""

LAST = re.compile(
    r"^(?:language_model\.model|model\.language_model|model)\.norm\.weight$|^(?:language_model\.)?lm_head\.weight$"
)
"""Likewise, what follows the layers."""


@dataclass(frozen=True)
class Components:
    """A loaded model: three networks, the tokenizer, and how to hold each network while it works."""

    transformer: Flux2Transformer
    text_encoder: LanguageModel
    vae: Autoencoder
    tokenizer: ChatTokenizer
    style: PromptStyle
    device: torch.device
    hold_transformer: Hold
    hold_text_encoder: Hold
    hold_vae: Hold
    notes: tuple[str, ...] = ()
    """What happened while loading that the user should know, a line each."""
    told: list[str] = field(default_factory=list)
    """What happened since, a line each, until it is said."""


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The shapes of a checkpoint's networks, from its configuration files."""
    preset = checkpoint.preset
    return Architecture(
        transformer=TransformerConfig.from_dict(checkpoint.config("transformer")),
        language=LanguageConfig.from_dict(checkpoint.config("text_encoder")),
        autoencoder=AutoencoderConfig.from_dict(checkpoint.config("vae")),
        text_layers=preset.text_layers,
        text_tokens=preset.text_tokens,
        passes=2 if preset.guidance == "cfg" else 1,
        stored=stored(checkpoint),
        references_once=preset.references_once,
    )


def stored(checkpoint: Checkpoint) -> str:
    """The one type that the weights of the transformer and the text encoder have in their files, "" where there is none or the
    transformer is a single file, which is converted."""
    if checkpoint.single is not None:
        return ""
    types = {weights.stored(checkpoint.folder / name) for name in ("transformer", "text_encoder")}
    return types.pop() if len(types) == 1 else ""


PARTS = "transformer", "text_encoder", "vae", "operations"
"""What is made of a plan by itself: three networks, and what runs between the transformer's matmuls."""


def build(
    plan: Plan,
    checkpoint: Checkpoint,
    hardware: Hardware,
    adapters: tuple[Lora, ...] = (),
    keep_prompts: bool = False,
    before: Components | None = None,
    parts: Collection[str] = PARTS,
) -> Components:
    """Read the weights and place them as the plan says.

    Args:
        plan: what to build.
        checkpoint: where the files are.
        hardware: the device to place them on.
        adapters: LoRAs merged into the transformer, in order.
        keep_prompts: keep prompts' embeddings on disk, and read the text encoder when a prompt is not among them.
        before: what has all other parts, which stay as they are.
        parts: those of :data:`PARTS` to make; all of them where nothing was there before.

    Raises:
        BackendUnavailableError: the plan's attention backend does not import.
        WeightsDamagedError: a file is unreadable or does not fit.
    """
    arch, device = architecture(checkpoint), torch_device(hardware)
    if widens_attention(hardware, plan.dtype):
        widen()
    new: dict[str, Any] = {}
    notes: list[str] = []
    told: list[str] = [] if before is None else before.told
    if "transformer" in parts:
        transformer, note = read_transformer(plan, checkpoint, hardware, adapters)
        notes.append(note)
        hold_transformer = place(transformer.eval(), device, plan.transformer, told.append)
        new |= {"transformer": transformer, "hold_transformer": hold_transformer}
    if "text_encoder" in parts:
        source = Source(checkpoint, "text_encoder")
        with meta():
            text_encoder = LanguageModel(arch.language, arch.text_layers)

        # The first use may be in inference mode, and weights made there could not be changed later.
        @torch.inference_mode(False)
        def read_text_encoder() -> Hold:
            try:
                note = fill(text_encoder, plan.text_encoder, plan.dtype, source, device)
            except BaseException:  # the next use reads it anew, without what this one has left in it
                with meta():
                    vars(text_encoder).update(vars(LanguageModel(arch.language, arch.text_layers)))
                raise
            (told if keep_prompts else notes).append(note)
            return place(text_encoder.eval(), device, plan.text_encoder, told.append)

        hold = Later(read_text_encoder) if keep_prompts else read_text_encoder()
        new |= {"text_encoder": text_encoder, "hold_text_encoder": hold}
    if "vae" in parts:
        vae = read_vae(plan, checkpoint)
        new |= {"vae": vae, "hold_vae": place(vae.eval(), device, plan.vae, told.append)}
    if plan.keep_freed:  # not before: what reading the weights frees goes back to the system
        heap.keep()
    new["notes"] = tuple(note for note in notes if note)
    if before is None:
        tokenizer = ChatTokenizer(checkpoint.folder / "tokenizer")
        components = Components(tokenizer=tokenizer, style=prompt_style(checkpoint), device=device, told=told, **new)
    else:
        components = replace(before, **new)
    if {"transformer", "operations"} & set(parts):
        components.transformer.ops = operations(plan, arch.transformer, device)
    if keep_prompts and "text_encoder" in parts:
        kept = KeptPrompts(text_facts(plan, source, arch), DTYPES[plan.dtype], told=told)
        return remembering(components, kept)
    return components


def read_transformer(
    plan: Plan, checkpoint: Checkpoint, hardware: Hardware, adapters: tuple[Lora, ...]
) -> tuple[Flux2Transformer, str]:
    """The transformer with its weights, its blocks to be compiled where the plan says so, and what the user should know."""
    config = architecture(checkpoint).transformer
    with meta():
        transformer = Flux2Transformer(config)
    source = Source(checkpoint, "transformer", adapters)
    note = fill(transformer, plan.transformer, plan.dtype, source, torch_device(hardware))
    for name in SCHEDULE:
        getattr(transformer, name).to("cpu", DTYPES[plan.schedule])  # they are on the device for a table only
    if plan.compile == "blocks":
        how = plan.dtype, plan.transformer.format, plan.ops, plan.attention
        compile_kept(transformer, mark(config, hardware, *how))
    return transformer, note


def read_vae(plan: Plan, checkpoint: Checkpoint) -> Autoencoder:
    """The autoencoder, on the host, with its convolutions as the plan wants them."""
    vae = build_vae(checkpoint, DTYPES[plan.vae.format])
    if plan.fold_upsampling:
        vae.fold_upsampling()
    if plan.channels_last:
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae


def compile_kept(transformer: Flux2Transformer, path: Path) -> None:
    """Compile the blocks, keep their code beside ``path``, their mark, and leave that once they have run."""
    compile_blocks(transformer, path.parent)

    def leave(*_: object) -> None:
        hook.remove()
        with suppress(OutputError):  # a next plan would expect it to compile again, and that is all
            write(path, b"")

    hook = transformer.register_forward_hook(leave)


def text_facts(plan: Plan, source: Source, arch: Architecture) -> str:
    """All that a prompt's embedding follows from beside its tokens, as JSON."""
    held = plan.text_encoder
    known = {
        "torch": torch.__version__,
        "device": plan.device.split(":")[0],
        "format": held.format,
        "keep": held.keep,
        "layers": arch.text_layers,
        "sources": [disk.fingerprint(path) for path in source.files],
    }
    return json.dumps(known, sort_keys=True)


def emptied(components: Components, parts: Iterable[str]) -> Components:
    """What is left of ``components`` without some of their networks, which go when nobody else has them: enough to plan with."""
    gone: dict[str, Any] = {}
    for name in parts:
        if name != "operations":
            gone |= {name: nn.Module(), f"hold_{name}": nullcontext}
    return replace(components, **gone)


def settle(components: Components, plan: Plan) -> None:
    """Let as many blocks stay on the device, and wait in host memory, as ``plan`` says, which may change from one request to the
    next."""
    adapt(components.hold_transformer, plan.transformer)
    adapt(forgetting(components).hold_text_encoder, plan.text_encoder)


@contextmanager
def remainder(plan: Plan, checkpoint: Checkpoint, components: Components) -> Iterator[Remainder]:
    """What prompt expansion needs of the language model beside the text encoder: read, on the device inside, and given up after.

    Raises:
        WeightsDamagedError: a file is unreadable or does not fit.
    """
    assert plan.expansion is not None, "requests with expansion are planned with it"
    arch, source = architecture(checkpoint), Source(checkpoint, "expansion")
    read = max(arch.text_layers)
    with meta():
        network = Remainder(arch.language, read)
    if not any(remainder_name(name, read) == "head.weight" for path in source.files for name in weights.header(path)):
        network.head = None
    components.told.append(fill(network, plan.expansion, plan.dtype, source, components.device))
    hold = place(network.eval(), components.device, plan.expansion, components.told.append)
    try:
        with hold():
            yield network
    finally:
        release(hold)


@dataclass(frozen=True)
class Source:
    """Where one network's weights come from.

    Attributes:
        checkpoint: the model.
        component: "transformer", "text_encoder", or "expansion" for what the text encoder's files have beside it.
        adapters: LoRAs for it, merged in order.
    """

    checkpoint: Checkpoint
    component: str
    adapters: tuple[Lora, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The weights' files."""
        if self.component == "transformer" and self.checkpoint.single is not None:
            return [self.checkpoint.single]
        return weights.weight_files(self.folder)

    @property
    def folder(self) -> Path:
        """Of the component's files."""
        return self.checkpoint.folder / ("text_encoder" if self.component == "expansion" else self.component)

    def tensors(self, network: nn.Module) -> weights.Tensors:
        """The checkpoint's tensors under ``network``'s names, each read when it is asked for.

        Raises:
            WeightsDamagedError: they are unreadable or do not fit.
        """
        single = self.checkpoint.single if self.component == "transformer" else None
        if single is not None:
            return weights.fitting(network, read_single(single), str(single))
        rename = language_name if isinstance(network, LanguageModel) else None
        if isinstance(network, Remainder):
            rename = partial(remainder_name, read=max(self.checkpoint.preset.text_layers))
        return weights.fitting(network, weights.read_files(self.files), str(self.folder), rename)


def fill(network: nn.Module, held: ComponentPlan, dtype: str, source: Source, device: torch.device) -> str:
    """Give a network on the meta device its weights, in the format that its plan says.

    Quantized ones are read from the disk where they were kept; else they are made, adapters first, and kept: those of a network that
    is not resident a layer at a time, since host memory may be too short for all of it. Nothing is on the host twice but for a tensor
    at a time, and what is converted for a network that stays on a device is there at once.

    Returns:
        What the user should know, or "".
    """
    updates = [(loras.read(a.path), a.strength) for a in source.adapters]
    for adapter, (update, _) in zip(source.adapters, updates, strict=True):
        loras.check(network, update, adapter.path.name)
    home = device if held.placement == "resident" and device.type != "cpu" else None
    if held.format in DTYPES:
        weights.fill(network, source.tensors(network), dtype=DTYPES[held.format], device=home)
        loras.merge(network, updates, home)
        return ""
    recipe, kind = Recipe(held.format, keep=held.keep), DTYPES[dtype]
    adapters = [(a.path, a.strength) for a in source.adapters]
    stem = f"{source.checkpoint.name}-{source.component}"
    kept = disk.Kept(stem, recipe, kind, disk.facts(recipe, kind, source.files, adapters))
    if kept.read(network, device):
        return ""

    def made(keep: convert.Keep | None = None) -> tuple[str, ...]:
        coming = convert.Coming(source.tensors(network), home, keep)
        return convert.convert(network, recipe, kind, device, lambda name, w: loras.added(name, w, updates), coming)

    if held.placement != "resident" and not recipe.form.not_kept:
        size = sum(int(p.numel() * recipe.form.weight_bytes) for p in network.parameters())
        if not kept.make(size, made) and kept.read(network, device):
            return ""
    return kept.write(network, made())


def operations(plan: Plan, config: TransformerConfig, device: torch.device) -> Ops:
    """What runs between the transformer's matmuls, as the plan says."""
    own = kernels.fused(device, DTYPES[plan.dtype], config) if plan.ops == "triton" else TABLES[plan.ops]
    return replace(own, attend=attention.load(plan.attention))


def build_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> Autoencoder:
    """The checkpoint's autoencoder, on the host."""
    with meta():
        vae = Autoencoder(AutoencoderConfig.from_dict(checkpoint.config("vae")))
    folder = checkpoint.folder / "vae"
    files = weights.read_files(weights.weight_files(folder))
    weights.fill(vae, weights.fitting(vae, files, str(folder)), dtype=dtype, keep_dtype=KEPT_FLOAT32)
    return vae


def language_name(name: str) -> str | None:
    """Name of a text encoder's tensor in :class:`LanguageModel`, or None for what encoding does not need."""
    match = LAYER.match(name)
    return match.group(1) if match else None


def remainder_name(name: str, read: int) -> str | None:
    """Name of a text encoder's tensor in :class:`Remainder`, which counts layers from ``read`` on, or None."""
    if LAST.match(name):
        return "head.weight" if name.endswith("lm_head.weight") else "norm.weight"
    part = language_name(name) or ""
    _, _, rest = part.partition("layers.")
    number, _, place = rest.partition(".")
    return f"layers.{int(number) - read}.{place}" if number and int(number) >= read else None


def prompt_style(checkpoint: Checkpoint) -> PromptStyle:
    """How the model's family phrases prompts."""
    length = checkpoint.preset.text_tokens
    if checkpoint.preset.pipeline == "Flux2Pipeline":
        return PromptStyle(
            system_messages()["SYSTEM_MESSAGE"], parts=True, prompt_next=False, special=False, length=length
        )
    return PromptStyle(None, parts=False, prompt_next=True, special=True, length=length)


@cache
def system_messages() -> dict[str, str]:
    """The model makers' system messages, from the installed diffusers, without importing all of it."""
    package = importlib.util.find_spec("diffusers")
    assert package is not None and package.origin is not None, "diffusers is a dependency of flux2-local"
    path = Path(package.origin).parent / "pipelines" / "flux2" / "system_messages.py"
    spec = importlib.util.spec_from_file_location("flux2_local._system_messages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {k: v for k, v in vars(module).items() if k.startswith("SYSTEM_MESSAGE")}
