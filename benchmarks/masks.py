"""Which steps a step cache skips, recorded from the bundled model, to be replayed where weights are random.

    python -m benchmarks.masks                 # 28 steps, to benchmarks/masks/tiny-28-steps.json
    python -m benchmarks.masks --steps 50

What random weights draw says nothing about what may be skipped. So the decisions are those of a model that draws something, at
the same number of steps: every tier's own step cache, over the prompts of the contact sheet. Whether another model's pictures
would bear them is not said by that; what they save there is.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flux2_local import Flux2
from flux2_local.bench import environment
from flux2_local.bench.subject import PROMPTS
from flux2_local.cache import Recorded, watched
from flux2_local.errors import RequestError
from flux2_local.files import write
from flux2_local.presets import tiers

FOLDER = Path(__file__).parent / "masks"
MODEL, SIZE = "tiny", "square"


def place(steps: int) -> Path:
    return FOLDER / f"{MODEL}-{steps}-steps.json"


def record(steps: int, pictures: int) -> dict[str, Any]:
    """What every tier's step cache did to each picture, and of which picture's steps a replay is: the median by their number."""
    found: dict[str, Any] = {}
    for name, tier in tiers().items():
        if MODEL not in tier.cache:
            continue
        flux, courses = Flux2.load(MODEL, acceleration=name, device="cpu"), []
        for seed, prompt in enumerate(PROMPTS[:pictures]):
            asked = {"image_size": SIZE, "num_inference_steps": steps, "enable_safety_checker": False}
            with watched() as seen:
                flux.generate(prompt, seed=seed, **asked)
            courses += [skipped for _, skipped in seen]
        typical = sorted(courses, key=len)[len(courses) // 2]
        policy = asdict(tier.cache[MODEL].at(steps))
        policy["threshold"] = None if policy["threshold"] == math.inf else policy["threshold"]  # JSON has no infinity
        found[name] = {"policy": policy, "skipped": typical, "skipped_per_picture": [len(course) for course in courses]}
    return {"model": MODEL, "steps": steps, "size": SIZE, "prompts": PROMPTS[:pictures], "tiers": found}


def read(tier: str, steps: int) -> Recorded:
    """The recorded decisions of a tier for pictures of ``steps`` steps.

    Raises:
        RequestError: none were recorded.
    """
    path = place(steps)
    try:
        row = json.loads(path.read_text("utf-8"))["tiers"][tier]
    except (OSError, KeyError):
        raise RequestError(
            f"No step cache was recorded for the {tier} tier at {steps} steps. Run: python -m benchmarks.masks --steps {steps}"
        ) from None
    threshold = math.inf if row["policy"]["threshold"] is None else row["policy"]["threshold"]
    return Recorded(**{**row["policy"], "threshold": threshold}, skips=tuple(row["skipped"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, choices=range(4, 51), metavar="4..50", default=28)
    parser.add_argument("--pictures", type=int, choices=range(1, len(PROMPTS) + 1), default=len(PROMPTS), metavar="N")
    args = parser.parse_args()
    found = environment.record() | record(args.steps, args.pictures)
    write(place(args.steps), (json.dumps(found, indent=2) + "\n").encode())
    for tier, row in found["tiers"].items():
        print(f"{tier}: {len(row['skipped'])} of {args.steps} steps skipped: {', '.join(map(str, row['skipped']))}")
    print(f"written: {place(args.steps)}")


if __name__ == "__main__":
    main()
