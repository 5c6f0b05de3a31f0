"""A worker process: ``python -m flux2_local.batch.worker``. Loads one model and makes one picture per message."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, BinaryIO

from ..errors import Flux2Error
from ..server import frames


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer messages until there are no more: first what to load, then requests."""

    def tell(message: frames.Message, data: bytes = b"") -> None:
        target.write(frames.pack(message, data))
        target.flush()

    setup = frames.read(source)
    if setup is None:
        return
    try:
        from ..pipeline import Flux2
        from .engines import facts_of

        loading = setup[0]
        loading["lora"] = [tuple(pair) for pair in loading.get("lora") or []] or None
        flux = Flux2.load(**loading)
        tell(facts_of(flux))
    except Flux2Error as error:
        tell(failure(error))
        return
    try:
        for result in flux.generate_many(requests(source), return_errors=True):
            if isinstance(result, Flux2Error):
                tell({**failure(result), "ends": False})
                continue
            image = result.images[0]
            facts = {"size": (image.width, image.height), "nsfw": result.has_nsfw_concepts[0], "prompt": result.prompt}
            names = ("content_type", "file_name", "settings")
            tell({**facts, "seed": result.seed, **{name: getattr(image, name) for name in names}}, image.data)
    except Flux2Error as error:
        tell(failure(error))


def requests(source: BinaryIO) -> Any:
    """Requests as they come in."""
    while (frame := frames.read(source)) is not None:
        yield frame[0]


def failure(error: Flux2Error) -> frames.Message:
    return {"error": type(error).__name__, "message": str(error), "ends": True}


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's print must not get between the messages
    try:
        serve(sys.stdin.buffer, target)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
