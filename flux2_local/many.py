"""Many requests through one model: alike ones are denoised together, and the prompts of the next are encoded meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from .candidates import GATHERED
from .errors import Flux2Error, OutOfMemoryError, PlanError, RequestError
from .request import Request, derive_seed

if TYPE_CHECKING:
    from .pipeline import Flux2
    from .plan import Plan
    from .progress import Reporter
    from .result import Result
    from .stages import Run
    from .text.memory import Memory

T = TypeVar("T")
OWN = (RequestError, PlanError, OutOfMemoryError)
"""Errors that concern one request; any other ends them all."""

AHEAD_RESIDENT, AHEAD_STAGED = 1, 8
"""Prompts that are encoded ahead: of the next group, or, where the text encoder has to be moved to the device, of several. On a CPU
none, where denoising takes every core."""


def read(
    flux: Flux2, requests: Iterable[str | dict[str, Any] | Request], job_seed: int, report: Reporter
) -> Iterator[Run | Flux2Error]:
    """Each request checked and planned, or what is wrong with it. Seeds that are missing follow from their place."""
    for line, request in enumerate(requests, 1):
        fields = {"prompt": request} if isinstance(request, str) else request
        if isinstance(fields, Request):
            fields = fields.given()
        if fields.get("seed") is None:
            fields = {**fields, "seed": derive_seed(job_seed, line)}
        yield checked(flux, fields, report)


def checked(flux: Flux2, fields: dict[str, Any], report: Reporter) -> Run | Flux2Error:
    try:
        return flux._run(fields, report)
    except Flux2Error as error:
        return error


def kind(request: Request | None) -> Hashable:
    """Equal for requests whose pictures can be denoised together."""
    if request is None or request.images:
        return object()
    return request.size, request.num_inference_steps, request.acceleration, request.guidance_scale


def request_of(one: Run | Flux2Error) -> Request | None:
    return None if isinstance(one, Flux2Error) else one.request


def batch_of(one: Run | Flux2Error) -> int:
    return 1 if isinstance(one, Flux2Error) else gathered(one.plan)


def gathered(plan: Plan) -> int:
    """Pictures like ``plan``'s that go through the stages together: as many as are denoised so, or, where the transformer has to be
    moved to the device, more, which are denoised one after another."""
    return plan.batch if plan.transformer.placement == "resident" else max(plan.batch, GATHERED)


def grouped(
    items: Iterable[T], request_of: Callable[[T], Request | None], batch: Callable[[T], int]
) -> Iterator[list[T]]:
    """Neighbours that are alike, in groups of as many pictures as go through the stages together. Follows from the items alone."""
    for _, alike in groupby(items, lambda item: kind(request_of(item))):
        group: list[T] = []
        count = size = 0
        for item in alike:
            request = request_of(item)
            number = 1 if request is None else request.num_images
            size = size or batch(item)
            if group and count + number > size:
                yield group
                group, count = [], 0
            group.append(item)
            count += number
            if count >= size:
                yield group
                group, count = [], 0
        if group:
            yield group


def results(flux: Flux2, groups: Iterable[list[Run | Flux2Error]]) -> Iterator[Result | Flux2Error]:
    """What every request gives, in order; the error in its place where it gives none.

    Raises:
        Flux2Error: what no request could be worked on under.
    """
    from .text.memory import Memory, forgetting

    remembers = flux.settings.keep_prompts or isinstance(flux._components.text_encoder, Memory)
    try:
        with ThreadPoolExecutor(1) as thread:
            for group, following in with_following(groups, ahead(flux)):
                runs = [one for one in group if not isinstance(one, Flux2Error)]
                later = [one for part in following for one in part if not isinstance(one, Flux2Error)]
                made = worked(flux, runs, partial(reading, flux, runs, later, thread))
                for one in group:
                    result = one if isinstance(one, Flux2Error) else next(made)
                    if isinstance(result, Flux2Error) and not isinstance(result, OWN):
                        raise result
                    yield result
    finally:
        if not remembers:
            with flux._turn:
                flux._components = forgetting(flux._components)


def ahead(flux: Flux2) -> int:
    """How many groups' prompts are encoded before it is their turn."""
    if flux.plan.text_encoder.placement != "resident":
        return max(1, AHEAD_STAGED // gathered(flux.plan))
    return 0 if flux.hardware.kind == "cpu" else AHEAD_RESIDENT


def with_following(groups: Iterable[T], count: int) -> Iterator[tuple[T, list[T]]]:
    """Each with the ``count`` that come after it."""
    waiting: deque[T] = deque()
    for group in groups:
        waiting.append(group)
        if len(waiting) > count:
            yield waiting.popleft(), list(waiting)
    while waiting:
        yield waiting.popleft(), list(waiting)


def worked(flux: Flux2, runs: list[Run], around: Callable[[], Any]) -> Iterator[Result | Flux2Error]:
    """What a group gives, or the error that kept it from being made."""
    if not runs:
        return iter(())
    try:
        return iter(flux._work(runs, around))
    except OWN as error:
        return iter([error] * len(runs))


def remember(flux: Flux2) -> Memory:
    """Keep the embeddings of the prompts that ``flux`` encodes from here on."""
    from .text.memory import remembering

    flux._components = remembering(flux._components)
    memory: Any = flux._components.text_encoder
    return memory


@contextmanager
def reading(flux: Flux2, runs: list[Run], later: list[Run], thread: ThreadPoolExecutor) -> Iterator[None]:
    """Have the prompts of ``later`` encoded: beside the work on ``runs``, or where weights have to be moved, before it.

    What fails is tried again in its turn.
    """
    from .plan import built

    memory = remember(flux)
    form = built(flux.plan)["text_encoder"]
    same = [run for run in later if built(run.plan)["text_encoder"] == form and not run.request.enable_prompt_expansion]
    if flux.plan.text_encoder.placement == "resident":
        beside = thread.submit(lambda: memory.read(tokens_of(same)))
        try:
            yield
        finally:  # what is tried again may load another text encoder
            wait([beside])
        return
    own = tokens_of([run for run in runs if not run.request.enable_prompt_expansion])
    if not memory.knows(own):
        memory.read([*own, *tokens_of(same)])
    yield


def tokens_of(runs: list[Run]) -> list[Any]:
    return [tokens for run in runs for tokens in run.tokens(run.request.prompt)]
