"""Ways of holding a model, each with what it takes: seconds, device memory, host memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from . import costs, footprint, quant, segments
from .costs import PAGEABLE, WIDTH, Architecture, Work
from .footprint import Setup, Weights
from .hardware import Hardware, unfolds_convolutions, widens_attention, widens_int8_weights
from .homes import Home, Traveller, homes
from .model.kernels import place_without, summed
from .offload.streamed import READ_AHEAD, RING
from .presets import Tier, show_bytes, tiers
from .quant.recipe import Recipe
from .request import Variant

Placement = Literal["resident", "staged", "streamed"]

SYSTEM_RESERVE = {"cuda": 600 * 2**20, "cpu": 512 * 2**20, "mps": 2 * 2**30}
"""Bytes left to the CUDA context and its libraries, or to the operating system."""

HOST_RESERVE = 2 * 2**30
"""Bytes of host memory left to the process and the system where weights wait in it."""

TILE = 512
"""Side in pixels of the tiles that pictures are decoded in where memory is short; not for the exact tier."""

TILED = (4 / 3) ** 2
"""How many times the pixels of a large picture are decoded in tiles that overlap by a quarter."""

PREVIEW = 16
"""Side in tokens of the pictures that previews are decoded to at most."""

GATHERED = 4
"""Pictures of different requests in bulk for which the transformer is brought once. They are ready together."""


@dataclass(frozen=True)
class Need:
    """What is to be planned for: a model's architecture, a variant, a tier and a request's size."""

    model: str
    variant: Variant
    tier: Tier
    arch: Architecture
    work: Work


@dataclass(frozen=True)
class Layout:
    """Where each network is; ``reason`` says it in words."""

    name: str
    transformer: Placement
    text_encoder: Placement
    vae: Placement
    reason: str


LAYOUTS = (
    Layout("resident", "resident", "resident", "resident", "everything stays on the device"),
    Layout(
        "text encoder streamed", "resident", "streamed", "resident",
        "all stays on the device but the text encoder, whose layers pass through it",
    ),
    Layout("staged", "staged", "staged", "staged", "one network at a time on the device"),
    Layout("streamed", "streamed", "streamed", "staged", "blocks pass through the device while others compute"),
)  # fmt: skip


MAPPED = Layout("mapped", "streamed", "streamed", "resident", "blocks are read from their files while others compute")
"""Of a CPU, whose memory the weights of the other layout are in."""


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of a request.

    Attributes:
        encode: reading the prompt, moving the text encoder's weights included.
        place: moving the transformer's weights before and in the first step, the autoencoder's, and reading references where that is
            done once: once for all pictures.
        step: of a denoising step after the first, on the average of those that are computed and those that are skipped.
        decode: per picture.
        compute: of a step with all weights at hand, likewise.
        expand: rewriting the prompt, moving weights included; 0 where it is not rewritten.
    """

    encode: float
    place: float
    step: float
    decode: float
    compute: float
    expand: float = 0.0

    def total(self, work: Work) -> float:
        """Of the request, by which ways are compared: without the prompt's expansion, for which nothing else is held otherwise."""
        return self.encode + self.place + work.images * (work.steps * self.step + self.decode)


@dataclass(frozen=True)
class Candidate:
    """One way of holding the networks.

    Attributes:
        name: for people.
        form: the weights' format, or None for the compute type.
        layout: where the networks are.
        stay: numbers of the transformer's blocks that stay, where it streams.
        homes: where each network waits that is not on the device all the time.
        tile: side of a decoding tile, or 0.
        together: whether guidance's two passes run as one of a batch twice as large.
        seconds: predicted.
        plain: what they would be if the format's products took as long as the compute type's: all that its memory gains.
        peak, host, disk: bytes of device memory at most, of host memory for weights that wait, and of files.
        problem: why it does not fit, or "".
        reason: what it is like.
        text_stay: where a prompt is expanded, numbers of the text encoder's blocks that stay meanwhile, where it streams.
        expansion, expansion_stay: likewise, where what expansion needs beside it is meanwhile, and which of its blocks stay.
    """

    name: str
    form: quant.Format | None
    layout: Layout
    stay: tuple[int, ...]
    homes: Mapping[str, Home]
    tile: int
    together: bool
    seconds: Seconds
    plain: Seconds
    peak: int
    host: int
    disk: int
    problem: str
    reason: str
    text_stay: tuple[int, ...] = ()
    expansion: Placement = "resident"
    expansion_stay: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """The relative error of a layer's output; none in the compute type."""
        return 0.0 if self.form is None else self.form.loss


@dataclass(frozen=True)
class Terms:
    """What all candidates of one plan have in common: the need, the machine, and what was chosen before.

    Attributes:
        limit: bytes of device memory that weights and activations may take.
        ops, attention: what computes between the matmuls, and attention.
        skipping: whether steps may be skipped.
        folded: whether the decoder's upsampling is folded.
        spared: share of a step's seconds that skipping steps is expected to spare on the average.
        merged: whether LoRAs are merged into the transformer.
    """

    need: Need
    hardware: Hardware
    dtype: str
    limit: int
    ops: str
    attention: str
    skipping: bool
    folded: bool
    spared: float = 0.0
    merged: bool = False

    @property
    def schedule(self) -> str:
        """The type that timesteps, guidance and modulations are computed in: float32 where the exact tier computes in it."""
        wide = not self.need.tier.exact and tiers()["none"].dtypes[self.hardware.kind][0] == "float32"
        return "float32" if wide else self.dtype


def layouts(terms: Terms, form: quant.Format | None) -> tuple[Layout, ...]:
    """Candidate layouts. Where device and host share their memory, moving weights gains nothing, but a CPU can leave them in files."""
    if terms.hardware.kind == "cuda":
        return LAYOUTS
    files = terms.hardware.kind == "cpu" and all(filed(terms, form, name) for name in ("transformer", "text_encoder"))
    return (LAYOUTS[0], MAPPED) if files else LAYOUTS[:1]


def filed(terms: Terms, form: quant.Format | None, component: str) -> bool:
    """Whether a network's weights are mapped from files just as they are used; else they are made in memory when they are loaded."""
    if form is not None:
        return not form.not_kept and form.backend != "quanto"  # whose tensors are copied when they are read
    if component == "vae":
        return True
    return terms.need.arch.stored == terms.dtype and not (terms.merged and component == "transformer")


GUIDED = {False: "two passes", True: "one pass"}
"""How a step of classifier-free guidance runs, by whether its passes do together."""


def ways(need: Need) -> tuple[bool, ...]:
    """Whether guidance's two passes may run apart or together, as the batch of both: the exact tier computes each by itself, as
    the reference does, and without guidance there is one."""
    return (False, True) if need.arch.passes > 1 and not need.tier.exact else (False,)


@dataclass(frozen=True)
class Draft:
    """One format, layout and way of guidance, from which :meth:`candidate` is worked out."""

    terms: Terms
    form: quant.Format | None
    layout: Layout
    together: bool = False

    @property
    def setup(self) -> Setup:
        """For every stage but denoising, whose own is :attr:`stepping`: counts are remembered for each setup."""
        t = self.terms
        return Setup(
            arch=t.need.arch if t.need.work.references else replace(t.need.arch, references_once=False),
            dtype=t.dtype,
            kind=t.hardware.kind,
            form=self.form,
            ops=t.ops,
            attention=t.attention,
            skipping=t.skipping,
            folded=t.folded,
            channels_last=not t.need.tier.exact,
            gathered=1 if self.layout.transformer == "resident" else GATHERED,
            threads=t.hardware.cores if t.hardware.kind == "cpu" else 0,
            place=place_without(t.hardware) if self.form else None,
            summed=self.form is not None and self.form.product == "int8" and summed(t.hardware, t.dtype),
            unfolding=t.hardware.kind == "cpu" and unfolds_convolutions(t.dtype),
            widening=t.hardware.kind != "cpu" or widens_int8_weights(),
            widened=widens_attention(t.hardware, t.dtype),
        )

    @property
    def unpacked(self) -> Draft:
        """The same with weights that are unpacked and multiplied in the compute type."""
        return replace(self, form=replace(self.form, product="")) if self.form and self.form.product else self

    @property
    def stepping(self) -> Setup:
        return replace(self.setup, together=self.together)

    def weights(self, component: str) -> Weights:
        if component not in self._held:
            self._held[component] = self._weights(component)
        return self._held[component]

    @cached_property
    def _held(self) -> dict[str, Weights]:
        return {}

    def _weights(self, component: str) -> Weights:
        need = self.terms.need
        recipe = None
        if self.form is not None and component == "expansion":
            recipe = Recipe(self.form.name)
        elif self.form is not None and component != "vae":
            recipe = quant.recipe_for(self.form, need.model, component)
        dtype, schedule = WIDTH[self.terms.dtype], WIDTH[self.terms.schedule]
        held = footprint.weights(need.arch, component, self.terms.dtype, recipe, self.terms.folded)
        return replace(held, schedule=held.schedule // dtype * schedule)

    def placement(self, component: str) -> Placement:
        """Where a network is. What expansion needs beside the text encoder comes for it alone, where there is another place."""
        alone = self.layout.name == "resident" and self.terms.hardware.kind != "cuda"
        return {
            "expansion": "resident" if alone else "streamed",
            "transformer": self.layout.transformer,
            "text_encoder": self.layout.text_encoder,
            "vae": self.layout.vae,
        }[component]

    @property
    def kept(self) -> int:
        """Bytes of what never leaves the device: networks, what their products are worked out in, and the schedules' tables."""
        names = ("transformer", "text_encoder", "vae")
        found = sum(self.lasting(n) for n in names if self.placement(n) == "resident")
        found += footprint.workspace(self.terms.hardware)
        return found + footprint.tables(self.setup, self.terms.need.work)

    def taken(self, alive: int) -> int:
        """Bytes of device memory that ``alive`` bytes beside the weights come to with what lies between them unused."""
        hardware = self.terms.hardware
        return alive + (segments.unused(alive, hardware.growing) if hardware.kind == "cuda" else 0)

    @property
    def leaving(self) -> int:
        """Bytes of what only makes the schedule's table, which are on the device while one is made. A CPU's memory they leave only
        for their files, which do not have them in a type of their own."""
        t = self.terms
        if t.hardware.kind == "cpu" and (self.layout.transformer == "resident" or t.schedule != t.dtype):
            return 0
        return self.weights("transformer").schedule

    def lasting(self, component: str) -> int:
        """Bytes of a network without what leaves once the schedule's table is made."""
        return self.weights(component).total - (self.leaving if component == "transformer" else 0)

    def visiting(self, component: str) -> int:
        """Bytes of a network that is wholly on the device only while it is in use."""
        return self.lasting(component) if self.placement(component) == "staged" else 0

    def denoising(self, stay: tuple[int, ...]) -> int:
        """Bytes of device memory while denoising, while the schedule's table is made before it, with none of the blocks that stay
        there yet, and while a preview is decoded between two steps."""
        held, work = self.weights("transformer"), self.terms.need.work
        sampling = footprint.sampling(self.stepping, work)
        alive = max(footprint.denoising(self.stepping, work), sampling + self.previewing())
        here = few = self.visiting("transformer")
        if self.layout.transformer == "streamed":
            here = held.streaming(stay) + held.schedule - self.leaving
            few = here - sum(held.blocks[number] for number in stay)
        return self.kept + max(here + self.taken(alive), few + self.leaving + self.taken(sampling)) + self.beside()

    def previewing(self) -> int:
        """Bytes of a preview, the decoder included where it is not there already."""
        side = PREVIEW * self.terms.need.arch.multiple
        return self.visiting("vae") + footprint.decoding(self.setup, side, side, 0)

    def beside(self) -> int:
        """Bytes of reading the next request's prompt meanwhile, in a thread of its own, as is done where the text encoder stays."""
        if self.layout.text_encoder != "resident":
            return 0
        return footprint.encoding(self.setup) + footprint.workspace(self.terms.hardware)

    def encoder(self, stay: tuple[int, ...]) -> int:
        """Bytes of the text encoder while it is used, beyond what never leaves."""
        streams = self.layout.text_encoder == "streamed"
        return self.weights("text_encoder").streaming(stay) if streams else self.visiting("text_encoder")

    def encoding(self, stay: tuple[int, ...] = ()) -> int:
        """Bytes of device memory while the prompt is read."""
        alive = footprint.texts(self.setup, self.terms.need.work) + footprint.encoding(self.setup)
        return self.kept + self.encoder(stay) + self.taken(alive)

    def expanding(self, text_stay: tuple[int, ...], stay: tuple[int, ...]) -> int:
        """Bytes of device memory while the prompt is expanded, other pictures' prompts being there already."""
        chat = self.terms.need.work.chat
        if not chat:
            return 0
        held = self.weights("expansion")
        there = held.total if self.placement("expansion") == "resident" else held.streaming(stay)
        alive = footprint.texts(self.setup, self.terms.need.work) + footprint.expanding(self.setup, chat)
        return self.kept + self.encoder(text_stay) + there + self.taken(alive) + self.beside()

    def pixels(self, tile: int) -> int:
        """Bytes of device memory while pictures are decoded or references encoded, the larger."""
        work = self.terms.need.work
        alive = footprint.decoding(self.setup, work.width, work.height, tile)
        alive = max(alive, *(footprint.referring(self.setup, *size) for size in work.references), 0)
        alive += footprint.carried(self.setup, work)
        return self.kept + self.visiting("vae") + self.taken(alive) + self.beside()

    def stay(self) -> tuple[int, ...]:
        """The most blocks that may stay."""
        if self.layout.transformer != "streamed":
            return ()
        tried = costs.staying(self.weights("transformer").blocks)
        return next((stay for stay in tried if self.denoising(stay) <= self.terms.limit), ())

    def expansion_stay(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most blocks of the text encoder, and of what expansion needs beside it, that may stay while a prompt is expanded."""
        if not self.terms.need.work.chat or self.placement("expansion") == "resident":
            return (), ()
        own = self.weights("text_encoder").blocks if self.layout.text_encoder == "streamed" else ()
        for stay in costs.staying((*own, *self.weights("expansion").blocks)):
            text = tuple(n for n in stay if n < len(own))
            others = tuple(n - len(own) for n in stay if n >= len(own))
            if max(self.expanding(text, others), self.encoding(text)) <= self.terms.limit:
                return text, others
        return (), ()

    def homes(
        self, stay: tuple[int, ...], text_stay: tuple[int, ...] = (), expansion_stay: tuple[int, ...] = ()
    ) -> dict[str, Home]:
        """Where the networks that leave the device wait: what is used most often has host memory first. What expansion needs, and
        all of which stays, is brought once from its files."""
        held_so = {"vae": (), "transformer": stay, "text_encoder": text_stay, "expansion": expansion_stay}
        if not self.terms.need.work.chat:
            del held_so["expansion"]
        away = {
            name: Traveller(
                self.weights(name), self.placement(name) == "streamed", kept, filed(self.terms, self.form, name)
            )
            for name, kept in held_so.items()
            if self.placement(name) != "resident"
        }
        every = {name: tuple(range(len(one.held.blocks))) for name, one in away.items()}
        if self.layout is MAPPED:
            return {name: Home(every[name], False, 0) for name in away}
        once = away.get("expansion")
        if once is None or not once.filed or len(expansion_stay) < len(every["expansion"]):
            return homes(away, self.room)
        del away["expansion"]
        found = homes(away, self.room - once.least)
        return {**found, "expansion": Home(every["expansion"], False, once.least)}

    @property
    def room(self) -> int:
        """Bytes of host memory that weights may wait in."""
        return max(0, self.terms.hardware.ram - HOST_RESERVE)

    def rate(self, home: Home) -> float:
        """Bytes per second at which what is not in page-locked memory comes to the device."""
        hardware = self.terms.hardware
        link = hardware.link_rate * PAGEABLE
        return link if home.whole else min(link, hardware.disk_rate)

    def stream(self, stay: tuple[int, ...], home: Home) -> costs.Stream:
        """How a network's blocks come to the device."""
        hardware = self.terms.hardware
        if self.layout is MAPPED:  # what is read is there
            return costs.Stream(stay, hardware.disk_rate, RING)
        return costs.Stream(stay, hardware.link_rate, RING, home.mapped, hardware.disk_rate, READ_AHEAD)

    def seconds(self, stay: tuple[int, ...], found: Mapping[str, Home], tile: int) -> Seconds:
        """Predicted seconds, expansion left out."""
        need, hardware = self.terms.need, self.terms.hardware
        arch, work = need.arch, need.work
        flops = hardware.products(self.terms.dtype)
        compute = costs.step_flops(arch, work) / flops
        compute += self.beyond("transformer", (arch.text_tokens + arch.step_tokens(work)) * arch.passes * work.batch)
        encode = costs.encode_flops(arch) / flops + self.beyond("text_encoder", arch.text_tokens * arch.passes)
        others = arch.reference_tokens(work) if arch.references_once else 0
        reading = costs.reference_flops(arch, work) / flops + self.beyond("transformer", others)
        decode = costs.decode_flops(arch, work.width, work.height) / flops * (TILED if tile else 1)
        place, step = reading, compute
        if home := found.get("vae"):
            place += self.weights("vae").total / self.rate(home)
        home = found.get("transformer")
        if home is not None and self.layout.transformer == "staged":
            place += self.weights("transformer").total / self.rate(home)
        elif home is not None:
            held, passes, stream = self.weights("transformer"), self.passes, self.stream(stay, home)
            first, later = costs.stream_seconds(compute / passes, held.blocks, stream)
            step = passes * later
            place += first - later - reading + (held.rest + held.schedule) / self.rate(home)
            place += costs.stream_seconds(reading, held.blocks, stream)[1] if reading else 0.0
        if home := found.get("text_encoder"):
            held = self.weights("text_encoder")
            if self.layout.text_encoder == "staged":
                encode += held.total / self.rate(home)
            else:
                encode, _ = costs.stream_seconds(encode, held.blocks, self.stream((), home))
        left = 1 - self.terms.spared
        return Seconds(encode, place, left * step, decode, left * compute)

    @property
    def passes(self) -> int:
        """How often a step brings the blocks that move."""
        return 1 if self.together else self.terms.need.arch.passes

    def expand_seconds(self, text_stay: tuple[int, ...], stay: tuple[int, ...], found: Mapping[str, Home]) -> float:
        """Predicted seconds of expanding the prompt, roughly: reading the files, the chat, and an answer of usual length, for each of
        whose tokens all weights are read and those that stay nowhere are copied."""
        need, hardware = self.terms.need, self.terms.hardware
        if not need.work.chat:
            return 0.0
        own, others = self.weights("text_encoder"), self.weights("expansion")
        arrive, moving = others.total / hardware.disk_rate, 0.0
        if home := found.get("text_encoder"):
            arrive += own.total / self.rate(home)
            if self.layout.text_encoder == "streamed":
                moving += self.stream(text_stay, home).moving(own.blocks)
        if home := found.get("expansion"):
            moving += self.stream(stay, home).moving(others.blocks)
        token = max(moving, (own.total + others.total) / hardware.memory_rate)
        flops = hardware.products(self.terms.dtype)
        return arrive + costs.expand_flops(need.arch, need.work.chat) / flops + costs.ANSWER * token

    def beyond(self, component: str, tokens: int) -> float:
        """Seconds that ``tokens`` take in a network beyond those of the compute type, where the format's products have a rate."""
        arch, hardware = self.terms.need.arch, self.terms.hardware
        if self.form is None or self.form.product not in hardware.flops:
            return 0.0
        return costs.linears(arch, component).seconds_beyond(tokens, hardware, self.terms.dtype, self.form)

    def disk(self) -> int:
        """Bytes of the model's files, in 16 bit, and of its quantized weights where they are kept."""
        files = costs.checkpoint_parameters(self.terms.need.arch) * WIDTH["bfloat16"]
        if self.form is None or self.form.not_kept:
            return files
        names = ["transformer", "text_encoder"] + ["expansion"] * bool(self.terms.need.work.chat)
        return files + sum(self.weights(name).total for name in names)

    def problem(self, peak: int, host: int) -> str:
        """Why it does not fit, or ""."""
        if peak > self.terms.limit:
            return f"needs {show_bytes(peak)}, {show_bytes(self.terms.limit)} may be used"
        if self.terms.hardware.kind == "cuda" and host > self.room:
            return f"needs {show_bytes(host)} of host memory, {show_bytes(self.room)} may be used"
        return ""

    def candidate(self) -> Candidate:
        """With whole pictures decoded where they fit, as many blocks staying as fit, and as much in host memory as fits."""
        stay, (text_stay, expansion_stay) = self.stay(), self.expansion_stay()
        found = self.homes(stay, text_stay, expansion_stay)
        host = sum(home.size for home in found.values())
        others = max(self.denoising(stay), self.encoding(text_stay), self.expanding(text_stay, expansion_stay))
        tile = 0
        if not self.terms.need.tier.exact and max(others, self.pixels(0)) > self.terms.limit:
            tile = TILE if self.pixels(TILE) < self.pixels(0) else 0
        peak, expand = max(others, self.pixels(tile)), self.expand_seconds(text_stay, expansion_stay, found)
        seconds, plain = (replace(draft.seconds(stay, found, tile), expand=expand) for draft in (self, self.unpacked))
        return Candidate(
            name=self._name(stay, found, tile),
            form=self.form,
            layout=self.layout,
            stay=stay,
            homes=found,
            tile=tile,
            together=self.together,
            seconds=seconds,
            plain=plain,
            peak=peak,
            host=host,
            disk=self.disk(),
            problem=self.problem(peak, host),
            reason=self._reason(stay, found),
            text_stay=text_stay,
            expansion=self.placement("expansion"),
            expansion_stay=expansion_stay,
        )

    def _name(self, stay: tuple[int, ...], found: Mapping[str, Home], tile: int) -> str:
        weights = "" if self.form is None else f"{self.form.name} weights, "
        count = len(self.weights("transformer").blocks)
        blocks = f", {len(stay)} of {count} blocks stay" if self.layout.transformer == "streamed" else ""
        away = [(name, home) for name, home in found.items() if not home.whole and name != "expansion"]
        parts = [self._from_disk(name, home, stay) for name, home in away]
        files = f", {' and '.join(parts)} from disk" if parts else ""
        guided = f", {GUIDED[self.together]}" if len(ways(self.terms.need)) > 1 else ""
        decoded = f"decoded in {tile}-pixel tiles" if tile else "decoded whole"
        return f"{weights}{self.layout.name}{blocks}{files}{guided}, {decoded}"

    def _from_disk(self, name: str, home: Home, stay: tuple[int, ...]) -> str:
        """What of a network comes from its files, in words: of the transformer, what does so in every step where anything does."""
        what, count = name.replace("_", " "), len(self.weights(name).blocks)
        moving = set(range(count)) - set(stay if name == "transformer" else ())
        often = moving & set(home.mapped)
        if not home.mapped or (often and often == moving):
            return what
        return f"{len(often)} of {len(moving)} moving {what} blocks" if often else f"what stays of the {what}"

    def _reason(self, stay: tuple[int, ...], found: Mapping[str, Home]) -> str:
        if self.layout.transformer != "streamed":
            return self.layout.reason
        seconds = self.seconds(stay, found, 0)
        passes = self.passes * (1 - self.terms.spared)
        moving = passes * self.stream(stay, found["transformer"]).moving(self.weights("transformer").blocks)
        if seconds.step <= 1.05 * seconds.compute:
            return f"{self.layout.reason}, which hides the {moving:.2f} s of copying a step"
        return f"{self.layout.reason}; copying takes {moving:.2f} s a step, computing {seconds.compute:.2f}"


def least(draft: Draft) -> int:
    """The smallest limit that a format and layout can run in."""
    tight = replace(draft, terms=replace(draft.terms, limit=0))
    return tight.candidate().peak
