"""A worker process: ``python -m flux2_local.batch.worker``. Loads one model and makes the pictures of each message."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import frames, many
from ..errors import Flux2Error
from ..progress import Reporter

if TYPE_CHECKING:
    from ..pipeline import Flux2
    from .engines import Answer


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer messages until there are no more: first what to load, then requests."""
    tell = partial(frames.write, target)
    setup = frames.read(source)
    if setup is None:
        return
    try:
        from ..request import make_request
        from .engines import batch_of, facts_of

        flux = load(setup[0])
        tell(facts_of(flux))
    except Flux2Error as error:
        tell(failure(error))
        return
    try:
        while (frame := frames.read(source)) is not None:
            message, _ = frame
            if "batch" in message:
                tell({"batch": batch_of(flux, make_request(flux.settings.variant, message["batch"]))})
                continue
            for answer in made(flux, message["requests"]):
                tell(*answer)
    except Flux2Error as error:
        tell(failure(error))


def load(loading: dict[str, Any]) -> Flux2:
    """A model, from arguments of :meth:`flux2_local.Flux2.load` as JSON leaves them.

    Raises:
        Flux2Error: as loading does.
    """
    from ..pipeline import Flux2

    lora = [tuple(pair) for pair in loading.get("lora") or []] or None
    return Flux2.load(**{**loading, "lora": lora})


def made(flux: Flux2, requests: list[dict[str, Any]]) -> Iterator[Answer]:
    """What requests that are denoised together give. Prompts are remembered from one group to the next.

    Raises:
        Flux2Error: what no picture could be made under.
    """
    many.remember(flux)
    for result in many.results(flux, [[many.checked(flux, fields, Reporter()) for fields in requests]]):
        if isinstance(result, Flux2Error):
            yield {**failure(result), "ends": False}, b""
            continue
        image = result.images[0]
        facts = {"size": (image.width, image.height), "nsfw": result.has_nsfw_concepts[0]}
        facts |= {name: getattr(image, name) for name in ("content_type", "file_name", "settings")}
        yield {**facts, "prompt": result.prompt, "seed": result.seed}, image.data


def failure(error: Flux2Error) -> frames.Message:
    return {"error": type(error).__name__, "message": str(error), "ends": True}


if __name__ == "__main__":
    frames.work(serve)
