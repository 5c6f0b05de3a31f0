"""Stages 6 to 8: the transformer. ``small`` and ``flow`` learn the velocity field, ``guidance`` bakes classifier-free guidance in.

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
from .layout import Teller, around, layout, scenery
from .network import TEXT_TOKENS, build, rotary, velocity
from .sample import guided, reporter
from .scenes import Scene, random_scene
from .trainer import Run, Trainer, load_ema

TOKENS_PER_BATCH = {"cpu": 4_500, "cuda": 60_000}
"""On a CPU time is short, and many small steps learn more in it than few large ones."""

SMALL, SQUARE = (8, 8), (16, 16)
SHARES = {SQUARE: 5.0, (24, 32): 4.0, (32, 24): 1.5, (18, 32): 1.5, (32, 18): 1.5, (32, 32): 2.0}
OTHERS = 1.0
"""How often the sizes come up: the presets', and each of the others, which stand for all between them."""

SHIFT = 6.0
"""How far σ leans towards noise: as far as the pipeline's 28 steps at 512². What a thing is gets decided there."""

STRESS = 3.0
"""How much more a token of a thing or a sign counts than one of the landscape: they cover a tenth of a picture, and
their shapes a part of that, while a prompt is mostly about them."""

TOLD_AFTER = 1
"""The single-stream block after which :class:`Teller` is asked."""

TOLD = 0.5
"""What its answers count beside the velocity. A hidden state that must name what lies where makes a small network learn
its things sooner, as aligning with another network's features does (arXiv:2410.06940); here the drawing itself knows."""


@dataclass(frozen=True)
class Look:
    """What a batch computes: a share of its pictures' tokens, signs' before things' before all others, between two noise levels;
    ``signs``: only of pictures that have a sign."""

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
        self.model = language.load(run).model.language_model.to(run.device, torch.bfloat16).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """bf16 [B, TEXT_TOKENS, 384]."""
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
    """Pictures of one size, on the host.

    Attributes:
        latents: packed [B, N, 128], float16.
        shown: what they show as a whole, of :func:`~scripts.train_tiny.layout.scenery`.
        found: what lies on their tokens, kinds first, of :func:`~scripts.train_tiny.layout.layout`.
        prompts: what they show, in words.
        size: height and width in tokens.
        look: what of them is to be computed.
    """

    latents: Tensor
    shown: Tensor
    found: tuple[Tensor, ...]
    prompts: list[str]
    size: tuple[int, int]
    look: Look


class Samples(IterableDataset[Batch]):
    """Endless batches. ``shares`` says how often each size comes up, ``looks`` what is computed, in turn by chance (of sizes
    that are no preset's, whole pictures where there is such a look)."""

    def __init__(self, run: Run, shares: dict[tuple[int, int], float], looks: tuple[Look, ...] = (WHOLE,)) -> None:
        self.shares = shares
        whole = [look for look in looks if look.share == 1] or looks  # a part is a shape of its own to compile
        self.looks = {b: looks if b in SHARES else whole for b in shares}
        self.tokens = TOKENS_PER_BATCH[run.device]
        self.paths = {b: latents.path_of(run, b) for b in shares}
        self.signed = {
            b: [i for i in range(len(rows)) if scene_of(b, i).sign] if any(look.signs for look in looks) else []
            for b, rows in self.rows().items()
        }

    def rows(self) -> dict[tuple[int, int], np.ndarray]:
        """The latents of each size, mapped. They are no attribute: a worker process would get them as a copy."""
        return {b: np.load(path, mmap_mode="r") for b, path in self.paths.items()}

    def __iter__(self) -> Iterator[Batch]:
        rng, rows = random.Random(), self.rows()
        while True:
            size = rng.choices(list(self.shares), list(self.shares.values()))[0]
            yield self.draw(rng, size, rows[size])

    def draw(self, rng: random.Random, size: tuple[int, int], rows: np.ndarray) -> Batch:
        """As many pictures of a size as a batch has tokens for; all that there are where those are fewer."""
        look = rng.choice(self.looks[size])
        count = self.tokens // (round(look.share * rows.shape[1]) + TEXT_TOKENS)
        pool = (self.signed[size] if look.signs else ()) or range(len(rows))  # of a few pictures none may have a sign
        chosen = sorted(rng.sample(pool, min(count, len(pool))))
        scenes = [scene_of(size, i) for i in chosen]
        prompts = [rich(s, rng) if rng.random() < 0.2 else caption(s, rng) for s in scenes]
        return Batch(torch.from_numpy(rows[chosen]), scenery(scenes), layout(scenes, size), prompts, size, look)


def scene_of(size: tuple[int, int], row: int) -> Scene:
    """What the latents of this size and row show."""
    return random_scene(random.Random(latents.BUCKETS[size][1] + row))


def batches(run: Run, samples: Samples) -> DataLoader[Batch]:
    """What ``samples`` draw; beside a card by worker processes, which would else wait for it."""
    workers = max(1, (os.cpu_count() or 2) - 1) if run.device == "cuda" else 0
    return DataLoader(samples, batch_size=None, num_workers=workers)


def said(prompts: list[str], empty: float) -> list[str]:
    """The prompts, a share of them left empty."""
    return ["" if random.random() < empty else prompt for prompt in prompts]


def noised(x0: Tensor, look: Look = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 noisy latents, σ, and the velocity to learn. σ is logit-normal, shifted by `SHIFT` towards noise, within the look's."""
    u = torch.sigmoid(torch.randn(len(x0), device=x0.device))
    sigma = look.above + (look.below - look.above) * SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn_like(x0)
    s = sigma[:, None, None]
    return ((1 - s) * x0 + s * noise).bfloat16(), sigma, noise - x0


def shares(run: Run, others: float = OTHERS) -> dict[tuple[int, int], float]:
    """How often each picture size comes up, of those whose latents are there; ``others`` is what one that is no preset's does."""
    there = [b for b in latents.BUCKETS if b != SMALL and latents.path_of(run, b).exists()]
    return {b: SHARES.get(b, others) for b in there if b in SHARES or others}


def flow_batches(run: Run, reader: Callable[[list[str]], Tensor], samples: Samples) -> Iterator[tuple[Tensor, ...]]:
    """The arguments of :func:`flow_loss` after the model."""
    for batch in batches(run, samples):
        text = reader(said(batch.prompts, empty=0.1))
        x, sigma, target = noised(batch.latents.to(run.device).float(), batch.look)
        found = [t.to(run.device) for t in batch.found]
        kept = around(found[0], batch.look.share)
        image = (t.take_along_dim(kept if t.ndim == 2 else kept[..., None], 1) for t in (x, target, *found))
        rows = torch.cat([torch.arange(TEXT_TOKENS, device=x.device).expand(len(x), -1), TEXT_TOKENS + kept], 1)
        yield (
            text,
            sigma,
            batch.shown.to(run.device),
            *image,
            *(table[rows] for table in rotary(*batch.size, TEXT_TOKENS, run.device)),
        )


def stress(kind: Tensor, sigma: Tensor) -> Tensor:
    """What the error on each token counts, [B, N]: of things and signs more than of the landscape. Where noise leaves open where
    they are, of every token as much more as the other pictures have something there: counting a thing more than its absence
    would teach that there is one where there only may be (the weighted error is least at :data:`STRESS` times the odds)."""
    there = (kind > 0).float()
    others = there.sum(0) - there
    often = others / others.amax(1, keepdim=True).clamp(min=1)
    return 1 + (STRESS - 1) * torch.where(sigma[:, None] > DECIDED, often, there)


def flow_loss(
    model: Flux2Transformer2DModel,
    text: Tensor,
    sigma: Tensor,
    shown: Tensor,
    x: Tensor,
    target: Tensor,
    kind: Tensor,
    pose: Tensor,
    letters: Tensor,
    outline: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    hidden: list[Tensor] = []
    error = velocity(model, x, text, sigma, torch.ones_like(sigma), (cos, sin), hidden=hidden) - target
    weight = stress(kind, sigma)
    told = model.teller(hidden[TOLD_AFTER], weight, shown, kind, pose, letters, outline)
    return (weight[..., None] * error.square()).mean() + TOLD * told


def train_small(run: Run) -> None:
    """Begin on pictures of 256², a quarter of the tokens of 512²."""
    train_on(run, {SMALL: 1.0})


def train_things(run: Run) -> None:
    """Go on where things and signs are: three times as many pictures in the same time."""
    train_on(run, shares(run), (THINGS, SIGNS))


def train_flow(run: Run) -> None:
    """Whole pictures, where things go and what signs say, around things alone and signs alone in turn."""
    train_on(run, shares(run), (WHOLE, WHOLE, WHOLE, PLACES, WORDS, THINGS, SIGNS))


def train_on(run: Run, sizes: dict[tuple[int, int], float], looks: tuple[Look, ...] = (WHOLE,)) -> None:
    torch._dynamo.config.recompile_limit = 64
    model = build()
    model.teller = Teller()
    model.to(run.device)
    trainer = Trainer(run, "flow", model, lr=1e-3, muon=2e-3, ema=0.998)
    reader = Reader(run)
    report = reporter(run, "flow", trainer, reader, None, grid=next(iter(sizes)))
    trainer.fit(flow_batches(run, reader, Samples(run, sizes, looks)), lambda *b: flow_loss(model, *b), report)


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


def train_guidance(run: Run) -> None:
    torch._dynamo.config.recompile_limit = 64
    teacher = build().to(run.device)
    load_ema(run.path("flow.safetensors"), teacher)
    teacher.requires_grad_(False)
    student = build().to(run.device)
    student.load_state_dict(teacher.state_dict())
    forget_guidance(student)
    trainer = Trainer(run, "guidance", student, lr=3e-4, muon=5e-4, ema=0.999)
    reader = Reader(run)
    empty = reader([""])

    def questions() -> Iterator[tuple[Tensor, ...]]:
        ask = run.compiled(velocity)
        for batch in batches(run, Samples(run, shares(run, others=0))):  # twice as much to compile for each as flow has
            text = reader(said(batch.prompts, empty=0.05))
            x, sigma, _ = noised(batch.latents.to(run.device).float())
            tables = rotary(*batch.size, TEXT_TOKENS, run.device)
            w = 1 + (MAX_GUIDANCE - 1) * torch.rand_like(sigma) ** 2
            with torch.no_grad():
                one = torch.ones_like(sigma)
                yes = ask(teacher, x, text, sigma, one, tables)
                no = ask(teacher, x, empty.expand(len(x), -1, -1).contiguous(), sigma, one, tables)
            yield x, text, sigma, w, guided(yes, no, sigma, w), *tables

    def loss(x: Tensor, text: Tensor, sigma: Tensor, w: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.mse_loss(velocity(student, x, text, sigma, w, (cos, sin)), target)

    trainer.fit(questions(), loss, reporter(run, "guidance", trainer, reader, 2.5))
