"""How good the bundled model is, and what each variant and tier costs it.

    python -m benchmarks.quality                     # 200 prompts, every variant and tier, eight sizes: 22 minutes on two CPU cores
    python -m benchmarks.quality --prompts 24        # a first look
    python -m benchmarks.quality --sheet docs/sheet.jpg   # the README's contact sheet, and nothing else
    python -m benchmarks.quality --card RESULT.json       # the model card's table from a result, and nothing else

Measures the autoencoder's PSNR on held-out drawings; how often generated pictures show what held-out prompts ask for, as the
judge reads them, beside the judge's score on the drawings themselves (the ceiling); how often nothing comes that was not asked
for ("alone": no more objects than the prompt names, where two in one third of a picture count as one); how often one object comes
once, and as the right one in its usual colour, where a prompt says neither its colour nor its place ("once" and "unsaid", a third
as many prompts more); PSNR and SSIM of each tier against ``none`` on the same prompts and seeds; and adherence at other sizes, beside
the ceiling there. Writes a JSON file with the environment.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from flux2_local import Flux2, load
from flux2_local.bench import environment
from flux2_local.bench.metrics import psnr, ssim
from flux2_local.bench.subject import PROMPTS
from flux2_local.costs import Work
from flux2_local.request import SIZES
from flux2_local.settings import choose, find_hardware, make_settings
from scripts.train_tiny.captions import GROUND, TIME, article, caption, rich
from scripts.train_tiny.data import HELD_OUT_SEED
from scripts.train_tiny.render import render
from scripts.train_tiny.scenes import Scene, random_scene

from . import judge

CARD = Path(__file__).parent.parent / "flux2_local" / "tiny" / "README.md"
BEGIN, END = "<!-- quality -->\n", "<!-- /quality -->"
"""What stands between them in the model card is a result's."""


@dataclass(frozen=True)
class Contender:
    """One way of generating."""

    variant: str
    acceleration: str

    def __str__(self) -> str:
        return self.variant if self.variant != "standard" else f"standard, {self.acceleration}"


CONTENDERS = (
    Contender("standard", "none"),
    Contender("standard", "regular"),
    Contender("standard", "high"),
    Contender("turbo", "regular"),
    Contender("flash", "regular"),
)

EVERYDAY = CONTENDERS[1]
"""What other sizes are measured with, and the sheet's rows are drawn with."""

OTHER_SIZES = (*(size for name, size in SIZES.items() if name != "square"), (800, 608), (672, 928))
"""Width and height in pixels: the presets but for the square of 512, and two between them."""

DRAWINGS = 64
"""How many go through the autoencoder: of 16 the mean is a decibel off."""


@dataclass(frozen=True)
class Score:
    """What a contender reached: adherence in percent per attribute, and how close its pictures are to those of the first contender."""

    name: str
    adherence: dict[str, float]
    psnr: float | None = None
    ssim: float | None = None


def prompts(scenes: Sequence[Scene]) -> list[str]:
    """One prompt per scene that names everything the judge asks about, half of them in the plain wording."""
    words = []
    for i, scene in enumerate(scenes):
        rng = random.Random(i)
        words.append(rich(scene, rng) if i % 2 else caption(scene, rng, full=True))
    return words


def lone_prompts(scenes: Sequence[Scene]) -> list[str]:
    """One prompt per scene of a single object that leaves its colour, size and place to the model."""
    return [f"{article(s.things[0].kind)} {GROUND[s.ground][0]} {TIME[s.time][0]}" for s in scenes]


def generate(
    contender: Contender, words: Sequence[str], size: tuple[int, int], seeds: Sequence[int], model: str
) -> Iterator[Image.Image]:
    flux = Flux2.load(model, contender.variant, acceleration=contender.acceleration)  # type: ignore[arg-type]
    width, height = size
    for prompt, seed in zip(words, seeds, strict=True):
        result = flux.generate(
            prompt, seed=seed, image_size={"width": width, "height": height}, enable_safety_checker=False
        )
        yield result.images[0].image


def autoencoder_psnr(count: int, model: str) -> float:
    """Mean PSNR in dB of ``count`` held-out drawings of 512² after encoding and decoding, as uint8."""
    checkpoint, _ = choose(model, make_settings("standard", "none"), find_hardware("cpu"), Work(), None)
    vae = load.build_vae(checkpoint, torch.float32)
    total = []
    for i in range(count):
        picture = np.asarray(render(random_scene(random.Random(HELD_OUT_SEED + i), signs=0.4), 512, 512))
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            y = vae.decode(vae.encode(x), 0)[0]
        decoded = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        total.append(psnr(picture, decoded))
    return statistics.mean(total)


def measure(contenders: Sequence[Contender], count: int, size: tuple[int, int], model: str) -> Iterator[Score]:
    reader = judge.load()
    scenes, lone = judge.held_out_scenes(count), judge.lone_scenes(math.ceil(count / 3))
    words = prompts(scenes) + lone_prompts(lone)

    def adherence(pictures: Sequence[Image.Image]) -> dict[str, float]:
        return judge.score(reader, scenes, pictures[:count]) | judge.lone_score(reader, lone, pictures[count:])

    yield Score("drawings (the ceiling)", adherence([render(s, *size) for s in [*scenes, *lone]]))
    first: list[np.ndarray] | None = None
    for contender in contenders:
        pictures = list(generate(contender, words, size, range(len(words)), model))
        arrays = [np.asarray(p) for p in pictures]
        near = far = None
        if first is None:
            first = arrays
        elif contender.variant == contenders[0].variant:
            near = statistics.mean(psnr(a, b) for a, b in zip(first, arrays, strict=True))
            far = statistics.mean(ssim(a, b) for a, b in zip(first, arrays, strict=True))
        yield Score(str(contender), adherence(pictures), near, far)


@dataclass(frozen=True)
class AtSize:
    """Adherence in percent per attribute at a size in pixels, of drawings and of generated pictures."""

    width: int
    height: int
    ceiling: dict[str, float]
    adherence: dict[str, float]


def measure_sizes(sizes: Sequence[tuple[int, int]], count: int, model: str) -> Iterator[AtSize]:
    """What :data:`EVERYDAY` reaches at other sizes, on the first ``count`` of the prompts."""
    reader, scenes = judge.load(), judge.held_out_scenes(count)
    words = prompts(scenes)
    for size in sizes:
        made = list(generate(EVERYDAY, words, size, range(count), model))
        yield AtSize(*size, judge.ceiling(reader, count, *size), judge.score(reader, scenes, made))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    names = list(scores[0].adherence)
    rows = [
        [
            score.name,
            f"{score.psnr:.1f}" if score.psnr is not None else "",
            f"{score.ssim:.4f}" if score.ssim is not None else "",
            *(f"{score.adherence.get(name, float('nan')):.0f}" for name in names),
        ]
        for score in scores
    ]
    return markdown(["", "PSNR", "SSIM", *names], rows)


def size_table(rows: Sequence[AtSize]) -> str:
    """Adherence at other sizes as a Markdown table, each figure before its ceiling."""
    names = list(rows[0].ceiling)
    cells = [
        [f"{row.width}×{row.height}", *(f"{row.adherence[name]:.0f} of {row.ceiling[name]:.0f}" for name in names)]
        for row in rows
    ]
    return markdown(["", *names], cells)


def write_card(result: Path, card: Path = CARD) -> None:
    """Put a result's adherence into the model card, between its markers, with the result's name."""
    text = card.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    card.write_text(before + BEGIN + card_table(result) + END + after, "utf-8")


def card_table(result: Path) -> str:
    """What the model card shows of a result, as Markdown."""
    record = json.loads(result.read_text("utf-8"))
    scores = [Score(**row) for row in record["scores"]]
    names = list(scores[0].adherence)
    shown = markdown(["", *names], [[s.name, *(f"{s.adherence[name]:.0f}" for name in names)] for s in scores])
    width, height = record["size"]
    about = f"{record['prompts']} prompts at {width}×{height}; autoencoder {record['autoencoder_psnr']:.1f} dB; `{result.name}`"
    shown += f"\n\n{about}\n"
    others = [AtSize(**row) for row in record.get("sizes", ())]  # older results have none
    if others:
        what = f"*{EVERYDAY}* at other sizes on a third of the prompts, before the ceiling there:"
        shown += f"\n{what}\n\n{size_table(others)}\n"
    return shown


def sheet(path: Path, model: str, side: int = 256) -> None:
    """Variants × prompts on one picture, with the prompts above."""
    rows = [Contender(v, EVERYDAY.acceleration) for v in ("standard", "turbo", "flash")]
    head = 34
    page = Image.new("RGB", (side * len(PROMPTS), head + side * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for column, prompt in enumerate(PROMPTS):
        half = prompt.rfind(" ", 0, len(prompt) // 2 + 4)
        draw.text((column * side + 4, 4), prompt[:half] + "\n" + prompt[half + 1 :], "black")
    for row, contender in enumerate(rows):
        made = generate(contender, PROMPTS, (512, 512), [7] * len(PROMPTS), model)
        for column, picture in enumerate(made):
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (column * side, head + row * side))
        draw.text((4, head + row * side + 4), contender.variant, "white", stroke_width=1, stroke_fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=88)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts per contender (default 200)")
    parser.add_argument("--only", nargs="+", help='contenders by name, such as "standard, none" or flash')
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--model", default="tiny", help="a name or a folder (default tiny)")
    parser.add_argument("--out", type=Path, help="the JSON file (default benchmarks/results/quality-DATE.json)")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here, and measure nothing")
    parser.add_argument(
        "--card", type=Path, metavar="RESULT", help="write the model card's table from this, and measure nothing"
    )
    args = parser.parse_args()
    if args.sheet or args.card:
        if args.sheet:
            sheet(args.sheet, args.model)
        if args.card:
            write_card(args.card)
        return
    chosen = [c for c in CONTENDERS if not args.only or str(c) in args.only]
    if not chosen:
        parser.error(f"--only takes some of: {'; '.join(map(str, CONTENDERS))}")
    record = environment.record() | {
        "prompts": args.prompts,
        "size": args.size,
    }
    record["autoencoder_psnr"] = autoencoder_psnr(DRAWINGS, args.model)
    print(f"autoencoder: {record['autoencoder_psnr']:.2f} dB on {DRAWINGS} held-out drawings", flush=True)
    scores = []
    for score in measure(chosen, args.prompts, tuple(args.size), args.model):
        scores.append(score)
        print(table(scores).splitlines()[-1], flush=True)
    record["scores"] = [asdict(score) for score in scores]
    sizes = []
    if EVERYDAY in chosen:
        for row in measure_sizes(OTHER_SIZES, math.ceil(args.prompts / 3), args.model):
            sizes.append(row)
            print(size_table([row]).splitlines()[-1], flush=True)
    record["sizes"] = [asdict(row) for row in sizes]
    path = environment.keep(record, "quality", args.out)
    print("\n\n".join(["", table(scores), *([size_table(sizes)] if sizes else []), f"written: {path}"]))


if __name__ == "__main__":
    main()
