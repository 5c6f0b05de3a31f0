"""What a batch will take, before it is run: pictures, seconds and bytes, from the planner's cost model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..explore import plan_for
from ..files import home
from ..images import MAX_REFERENCE_AREA, MIN_REFERENCE_SIDE, reference_size
from ..many import gathered
from ..plan import Plan
from ..request import Request
from ..settings import Settings
from .job import Job

BYTES_PER_PIXEL = {"png": 1.6, "jpeg": 0.45, "webp": 0.25}
"""Of photographs at the qualities that :mod:`..images` writes; drawings take less."""

RECORD_BYTES = 900
LARGEST = int(MAX_REFERENCE_AREA**0.5), int(MAX_REFERENCE_AREA**0.5)
"""What larger reference pictures are scaled down to."""

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Share:
    """The pictures of a job that run alike."""

    count: int
    plan: Plan


@dataclass(frozen=True)
class Forecast:
    """A job's prediction.

    Attributes:
        count, prompts: pictures, and different prompts among neighbours, each encoded once; of those that are expanded, all.
        seconds: of generating on one device, loading not included.
        size: bytes on the disk, about.
        shares: the kinds of pictures, largest share first.
    """

    count: int
    prompts: int
    seconds: float
    size: int
    shares: tuple[Share, ...]

    @property
    def per_hour(self) -> float:
        """Pictures that one device makes in an hour."""
        return 3600 * self.count / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        plans = [
            {
                "pictures": s.count,
                "width": s.plan.work.width,
                "height": s.plan.work.height,
                "steps": s.plan.work.steps,
                "acceleration": s.plan.acceleration,
                "seconds_each": s.plan.seconds,
                "plan": str(s.plan),
            }
            for s in self.shares
        ]
        facts = {"seconds": self.seconds, "pictures_per_hour": self.per_hour, "bytes": self.size}
        return {"prompts": self.prompts, **facts, "plans": plans}


def forecast(job: Job, model: str | Path | None, settings: Settings, device: str | None) -> Forecast:
    """Predict a job on this machine or a known card.

    Raises:
        ModelError, PlanError: as loading would.
    """
    kinds: Counter[tuple[Any, ...]] = Counter()
    examples: dict[tuple[Any, ...], tuple[Request, Sizes]] = {}
    size, prompts, last = 0.0, 0, ""
    for request, count in (pair for line in job.lines for pair in job.sweep.requests(line)):
        width, height = request.size
        references, expands = tuple(map(pixels, request.images)), request.enable_prompt_expansion
        # Coarsely, so that references of all sizes do not make a plan each.
        coarse = tuple(reference_size(*reference, MIN_REFERENCE_SIDE) for reference in references)
        kind = (width, height, request.num_inference_steps, request.acceleration, expands, coarse)
        kinds[kind] += count
        examples.setdefault(kind, (request, references))
        size += count * (RECORD_BYTES + width * height * BYTES_PER_PIXEL[request.output_format])
        prompts += count if expands else request.prompt != last
        last = "" if expands else request.prompt
    shares = [Share(count, plan_of(*examples[kind], model, settings, device)) for kind, count in kinds.most_common()]
    seconds = sum(s.count * (s.plan.seconds - s.plan.encode_seconds - s.plan.place_seconds) for s in shares)
    seconds += sum(s.count * s.plan.place_seconds / together(s.plan) for s in shares)
    seconds += prompts * max((s.plan.encode_seconds for s in shares), default=0.0)
    return Forecast(job.count, prompts, seconds, int(size), tuple(shares))


def plan_of(
    request: Request, references: Sizes, model: str | Path | None, settings: Settings, device: str | None
) -> Plan:
    """The plan for a request, whose own acceleration wins."""
    own = replace(settings, acceleration=request.acceleration or settings.acceleration)
    return plan_for(model, own, request, device, None, references)


def together(plan: Plan) -> int:
    """How many pictures weights are moved for once; one with references is alone in its group."""
    return 1 if plan.work.references else gathered(plan)


def pixels(source: str) -> tuple[int, int]:
    """Width and height of a reference picture; of the largest that is read, where it is not on this machine or cannot be read."""
    from PIL import Image

    try:
        with Image.open(home(source)) as image:
            size: tuple[int, int] = image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return LARGEST
    return size if min(size) >= MIN_REFERENCE_SIDE else LARGEST
