"""The transformer: ``small``, ``things`` and ``flow`` learn the velocity field, ``guidance`` bakes classifier-free guidance in.

They are rectified flow (arXiv:2209.03003): x = (1-σ)·picture + σ·noise, the model predicts noise - picture; one prompt
in ten is empty. ``guidance`` (arXiv:2210.03142) then teaches the same network to answer, for the guidance scale w on its
guidance embedding, what the two-pass v(empty) + w·(v(prompt) - v(empty)) of its teacher answers; in strong noise v(prompt).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from . import language, latents, tokenizer
from .captions import caption, rich
from .latents import SERIES, Series
from .layout import PARTS, Layout, Teller, around, layout, shown
from .network import TEXT_TOKENS, build, rotary, velocity
from .sample import guided, reporter
from .scenes import Scene
from .trainer import Run, Trainer, load_ema

Part = tuple[Scene, tuple[int, int], *tuple[Tensor, ...]]
"""What :meth:`Samples.part` makes of a picture."""

TOKENS_PER_BATCH = {"cpu": 4_500, "cuda": 60_000}
"""On a CPU time is short, and many small steps learn more in it than few large ones."""

SHARES = {
    "square": 14.0,
    "landscape_4_3": 10.0,
    "portrait_4_3": 2.0,
    "landscape_16_9": 2.0,
    "portrait_16_9": 2.0,
    "square_hd": 2.0,
    "others": 12.0,
    "between": 14.0,
}
"""How often the series come up."""

OTHERS = 540
"""How many tokens are computed of pictures of any size, so that several sizes are in one batch. Smaller ones come in halved batches
alone."""

HALVED = 256
"""Every other batch computes half of its pictures' tokens, by chance which, and so twice as many pictures; but not around things and
signs where there are no more tokens than this."""

SHIFT = 6.0
"""How far σ leans towards noise: as far as the pipeline's 28 steps at 512². What a thing is gets decided there."""

STRESS = 3.0
"""How much more a token counts that has a thing, a sign, or what the landscape has beside sky and ground: a sun is four tokens of
256, things cover a tenth of a picture, and their shapes a part of that, while a prompt is about nothing else."""

PLACED_AFTER = 0
"""The single-stream block after which :meth:`Teller.placed` is asked: as early as a token can know where the last ones lie, since
what goes where is settled by it."""

TOLD_AFTER = (1, 2)
"""The single-stream blocks after which :class:`Teller` is asked: once all has been read, and again, to mend what does not fit
together, before it is painted."""

TOLD = 0.5
"""What its answers count beside the velocity. A hidden state that must name what lies where makes a small network learn
its things sooner, as aligning with another network's features does (arXiv:2410.06940); here the drawing itself knows."""


@dataclass(frozen=True)
class Look:
    """What a batch computes.

    Attributes:
        share: of its pictures' tokens; below 1 a sign's first, then things', then any others.
        signs: only of pictures that have a sign.
        above, below: the noise levels between which it is.
    """

    share: float = 1.0
    signs: bool = False
    above: float = 0.0
    below: float = 1.0


DECIDED = 0.8
"""The noise level below which a single token shows whether it is a thing's. Above it the network has to choose where things go,
which it cannot learn from tokens that were chosen for it: it would see things everywhere."""

WHOLE, PLACES, WORDS = Look(), Look(above=DECIDED), Look(signs=True, above=DECIDED)
THINGS, SIGNS = Look(0.375, below=DECIDED), Look(0.125, signs=True, below=DECIDED)
"""Three pictures in four have no sign, and a letter is one of a picture's 256 tokens: looked at alone, there are ten times as many
in the same time. Below that noise level a letter shows already; that it is to be read from the prompt is learnt above it."""

MAX_GUIDANCE = 10.0


class Reader:
    """Prompt -> what the transformer reads, exactly as the pipeline's prompt encoding makes it."""

    def __init__(self, run: Run) -> None:
        self.device = run.device
        self.tokenizer = tokenizer.load(run.work).backend_tokenizer
        self.tokenizer.enable_truncation(TEXT_TOKENS)
        self.tokenizer.enable_padding(length=TEXT_TOKENS, pad_id=0, pad_token="<pad>")
        self.model = language.load(run).model.language_model.to(run.device, run.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """[B, TEXT_TOKENS, 384], of the run's dtype."""
        lines = [f"<s>[DESCRIBE][INST]{p}[/INST]" for p in prompts]
        rows = self.tokenizer.encode_batch(lines, add_special_tokens=False)
        ids = torch.tensor([e.ids for e in rows], device=self.device)
        mask = torch.tensor([e.attention_mask for e in rows], device=self.device)
        hidden = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([hidden[i] for i in language.OUT_LAYERS], -1)


@dataclass(frozen=True)
class Batch:
    """Pictures of which as many tokens are computed, on the host.

    Attributes:
        latents: of those tokens [B, n, 128], float16.
        shown: what the pictures show as a whole, of :func:`~scripts.train_tiny.layout.shown`.
        lies: what lies on the tokens.
        tables: each picture's own cos and sin [B, TEXT_TOKENS + n, head_dim/2], of :func:`~scripts.train_tiny.network.rotary`.
        prompts: what they show, in words.
        look: what of them is to be computed.
    """

    latents: Tensor
    shown: Tensor
    lies: Layout
    tables: tuple[Tensor, ...]
    prompts: list[str]
    look: Look


class Samples(IterableDataset[Batch]):
    """Endless batches. ``shares`` says how often each series comes up, ``looks`` what is computed, by chance."""

    def __init__(self, run: Run, shares: dict[str, float], looks: tuple[Look, ...] = (WHOLE,)) -> None:
        self.shares, self.looks = shares, looks
        self.tokens = TOKENS_PER_BATCH[run.device]
        self.paths = {name: latents.path_of(run, name) for name in shares}
        self.starts, self.signed = {}, {}
        for name, rows in self.rows().items():
            series = SERIES[name]
            starts = series.starts(series.count)
            count = int(np.searchsorted(starts, len(rows)))  # fewer were drawn where time was short
            self.starts[name] = starts[: count + 1]
            if any(look.signs for look in looks):
                self.signed[name] = np.array([i for i in range(count) if series.picture(i)[0].sign], dtype=int)

    def rows(self) -> dict[str, np.ndarray]:
        """The latents of each series, mapped. They are no attribute: a worker process would get them as a copy."""
        return {name: np.load(path, mmap_mode="r") for name, path in self.paths.items()}

    def __iter__(self) -> Iterator[Batch]:
        rng, rows = random.Random(), self.rows()
        while True:
            name = rng.choices(list(self.shares), list(self.shares.values()))[0]
            yield self.draw(rng, name, rows[name])

    def draw(self, rng: random.Random, name: str, rows: np.ndarray) -> Batch:
        """As many pictures of a series as a batch has tokens for; all that there are where those are fewer."""
        look, series, starts = rng.choice(self.looks), SERIES[name], self.starts[name]
        lengths = np.diff(starts)
        whole = int(lengths[0]) if series.grid else OTHERS
        if (whole > HALVED or look.share == 1) and rng.random() < 0.5:
            whole //= 2
        pool = self.signed[name] if look.signs else np.arange(len(lengths))
        pool = pool[lengths[pool] >= whole].tolist()
        if not pool:  # of a few pictures none may have a sign
            look, pool = WHOLE, np.flatnonzero(lengths >= whole).tolist()
        count = round(look.share * whole)
        chosen = sorted(rng.sample(pool, min(self.tokens // (count + TEXT_TOKENS), len(pool))))
        scenes, grids, *parts = zip(
            *(self.part(series, i, rows[starts[i] : starts[i + 1]], count, look) for i in chosen), strict=True
        )
        prompts = [rich(s, rng) if rng.random() < 0.2 else caption(s, rng) for s in scenes]
        x, cos, sin, *lies = (torch.stack(part) for part in parts)
        return Batch(x, shown(scenes, grids), Layout(*lies), (cos, sin), prompts, look)

    @staticmethod
    def part(series: Series, row: int, rows: np.ndarray, count: int, look: Look) -> Part:
        """A picture's scene and grid, and of ``count`` of its tokens latents, cos and sin with the text's before them, and layout."""
        scene, grid = series.picture(row)
        lies = layout([scene], grid)
        crowd = lies.kind if look.share < 1 else torch.zeros_like(lies.kind)
        (kept,) = around(crowd, count)
        with_text = torch.cat([torch.arange(TEXT_TOKENS), TEXT_TOKENS + kept])
        tables = (table[with_text] for table in rotary(*grid, TEXT_TOKENS, "cpu"))
        return scene, grid, torch.from_numpy(rows[kept]), *tables, *(t[0, kept] for t in lies)


def batches(run: Run, samples: Samples) -> DataLoader[Batch]:
    """What ``samples`` draw; beside a card by worker processes, which would else wait for it."""
    workers = max(1, (os.cpu_count() or 2) - 1) if run.device == "cuda" else 0
    return DataLoader(samples, batch_size=None, num_workers=workers)


def said(prompts: list[str], empty: float) -> list[str]:
    """The prompts, a share of them left empty."""
    return ["" if random.random() < empty else prompt for prompt in prompts]


def noised(x0: Tensor, dtype: torch.dtype, look: Look = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents as ``dtype``, σ, and the velocity to learn. σ is logit-normal, shifted by `SHIFT` towards noise, within the
    look's."""
    u = torch.sigmoid(torch.randn(len(x0), device=x0.device))
    sigma = look.above + (look.below - look.above) * SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn_like(x0)
    s = sigma[:, None, None]
    return ((1 - s) * x0 + s * noise).to(dtype), sigma, noise - x0


def shares(run: Run) -> dict[str, float]:
    """How often each series comes up, of those whose latents are there."""
    return {name: share for name, share in SHARES.items() if latents.path_of(run, name).exists()}


def flow_batches(run: Run, reader: Callable[[list[str]], Tensor], samples: Samples) -> Iterator[tuple[Tensor, ...]]:
    """The arguments of :func:`flow_loss` after the model."""
    for batch in batches(run, samples):
        text = reader(said(batch.prompts, empty=0.1))
        x, sigma, target = noised(batch.latents.to(run.device).float(), run.dtype, batch.look)
        known = (t.to(run.device) for t in (*batch.tables, *batch.lies))
        yield text, sigma, batch.shown.to(run.device), x, target, *known


def stress(there: Tensor, part: Tensor, sigma: Tensor) -> Tensor:
    """What the error on each token counts, [B, N]: more where something is ``there``. Where noise leaves open where things are, of
    every token as much more as the other pictures have something in the same ``part`` of theirs: counting a thing more than its
    absence would teach that there is one where there only may be (the weighted error is least at :data:`STRESS` times the odds)."""
    there = there.float()
    none = there.new_zeros(len(there), PARTS**2)
    some, seen = none.scatter_add(1, part, there), none.scatter_add(1, part, torch.ones_like(there))
    often = (some.sum(0) - some) / (seen.sum(0) - seen).clamp(min=1)
    often = often / often.amax(1, keepdim=True).clamp(min=1e-6)
    return 1 + (STRESS - 1) * torch.where(sigma[:, None] > DECIDED, often.gather(1, part), there)


def flow_loss(
    model: Flux2Transformer2DModel,
    text: Tensor,
    sigma: Tensor,
    shown: Tensor,
    x: Tensor,
    target: Tensor,
    cos: Tensor,
    sin: Tensor,
    *known: Tensor,
) -> Tensor:
    """Of the velocity and of what the network's middle must tell; ``known`` is a :class:`Layout`'s."""
    hidden: list[Tensor] = []
    lies = Layout(*known)
    error = velocity(model, x, text, sigma, torch.ones_like(sigma), (cos, sin), hidden=hidden) - target
    weight = stress(lies.kind > 0, lies.part, sigma)
    told = torch.stack([model.teller(hidden[block], weight, shown, lies) for block in TOLD_AFTER]).mean()
    told = told + model.teller.placed(hidden[PLACED_AFTER], shown)
    weight = torch.maximum(weight, stress(lies.scenery > 0, lies.part, sigma))
    return (weight[..., None] * error.square()).mean() + TOLD * told


def train_small(run: Run) -> None:
    """Begin on pictures of 256², a quarter of the tokens of 512²."""
    train_on(run, {"small": 1.0})


def train_things(run: Run) -> None:
    """Go on where things and signs are: three times as many pictures in the same time."""
    train_on(run, shares(run), (THINGS, SIGNS))


def train_flow(run: Run) -> None:
    """Whole pictures, where things go and what signs say, around things alone and signs alone in turn."""
    train_on(run, shares(run), (WHOLE, WHOLE, WHOLE, PLACES, PLACES, WORDS, THINGS, SIGNS))


def train_on(run: Run, series: dict[str, float], looks: tuple[Look, ...] = (WHOLE,)) -> None:
    torch._dynamo.config.recompile_limit = 64
    model = build()
    model.teller = Teller()
    model.to(run.device)
    trainer = Trainer(run, "flow", model, lr=1e-3, muon=2e-3, ema=0.998)
    reader = Reader(run)
    report = reporter(run, "flow", trainer, reader, None, grid=SERIES[next(iter(series))].grid)
    trainer.fit(flow_batches(run, reader, Samples(run, series, looks)), lambda *b: flow_loss(model, *b), report)


@torch.no_grad()
def forget_guidance(model: Flux2Transformer2DModel) -> None:
    """Make the guidance scale mean nothing yet: ``flow`` has only ever seen 1, and what the network makes of any other is
    noise. What the embedding of 1 adds moves into the timestep's embedding (by least squares over all timesteps, since
    neither has a bias), and the guidance embedding's last layer starts at zero."""
    embed = model.time_guidance_embed
    time, guide = embed.timestep_embedder, embed.guidance_embedder
    constant = guide(embed.time_proj(torch.full((1,), 1000.0)).to(guide.linear_1.weight))[0]
    hidden = F.silu(time.linear_1(embed.time_proj(torch.arange(0.0, 1000.0)).to(time.linear_1.weight)))
    fit = torch.linalg.lstsq(hidden.double().cpu(), constant.double().cpu().expand(len(hidden), -1), driver="gelsd")
    error = hidden.double().cpu() @ fit.solution - constant.double().cpu()
    print(f"guidance: left of the constant {float(error.norm(dim=1).mean() / constant.norm()):.4f}", flush=True)
    time.linear_2.weight += fit.solution.T.to(time.linear_2.weight)
    guide.linear_2.weight.zero_()


def outdated(run: Run) -> bool:
    """Whether the guided transformer is of a former state of the one that it is made from."""
    guided, taught = run.path("guidance.safetensors"), run.path("flow.safetensors")
    return guided.exists() and taught.exists() and guided.stat().st_mtime < taught.stat().st_mtime


def require_guided(run: Run) -> None:
    """Whatever is made of the guided transformer is made of the newest one.

    Raises:
        ValueError: ``flow`` has trained on since.
    """
    if outdated(run):
        raise ValueError("the transformer has trained on since guidance. Run the stage guidance again first.")


def train_guidance(run: Run) -> None:
    torch._dynamo.config.recompile_limit = 64
    path, taught = run.path("guidance.safetensors"), run.path("flow.safetensors")
    if outdated(run):
        print(f"guidance: {taught} has trained on since, begun anew from it", flush=True)
        path.unlink()
    teacher = build().to(run.device)
    load_ema(taught, teacher)
    teacher.requires_grad_(False)
    student = build().to(run.device)
    student.load_state_dict(teacher.state_dict())
    forget_guidance(student)
    trainer = Trainer(run, "guidance", student, lr=3e-4, muon=5e-4, ema=0.999)
    reader = Reader(run)
    empty = reader([""])

    def questions() -> Iterator[tuple[Tensor, ...]]:
        ask = run.compiled(velocity)
        for batch in batches(run, Samples(run, shares(run))):
            text = reader(said(batch.prompts, empty=0.05))
            x, sigma, _ = noised(batch.latents.to(run.device).float(), run.dtype)
            tables = tuple(t.to(run.device) for t in batch.tables)
            w = 1 + (MAX_GUIDANCE - 1) * torch.rand_like(sigma) ** 2
            with torch.no_grad():
                one = torch.ones_like(sigma)
                yes = ask(teacher, x, text, sigma, one, tables)
                no = ask(teacher, x, empty.expand(len(x), -1, -1).contiguous(), sigma, one, tables)
            yield x, text, sigma, w, guided(yes, no, sigma, w), *tables

    def loss(x: Tensor, text: Tensor, sigma: Tensor, w: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.mse_loss(velocity(student, x, text, sigma, w, (cos, sin)), target)

    trainer.fit(questions(), loss, reporter(run, "guidance", trainer, reader, 2.5))
