"""The worker process: it owns the device, holds the pipelines and works one request at a time.

Started by :mod:`.worker` as ``python -m flux2_local.server.generator``; messages come in on standard input and leave on
what was standard output. When the server goes away, however it goes, this process ends at once.
"""

from __future__ import annotations

import base64
import io
import os
import queue
import secrets
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import frames
from ..endpoints import Pipelines
from ..errors import Flux2Error
from .failures import make_failure

if TYPE_CHECKING:
    from ..pipeline import Flux2
    from ..progress import Progress
    from ..result import Result

NICENESS = 5
"""Where the processor computes the pictures, answering calls goes first."""

PREVIEW_QUALITY = 80


class Generator:
    """Reads messages in one thread and generates in another."""

    def __init__(self, source: BinaryIO, target: BinaryIO) -> None:
        self.source, self.target = source, target
        self.waiting: queue.Queue[frames.Message] = queue.Queue()
        self.cancelled: set[str] = set()

    def listen(self) -> None:
        """Take messages until the server is gone."""
        while (frame := frames.read(self.source)) is not None:
            message, _ = frame
            if message["op"] == "cancel":
                self.cancelled.add(message["id"])
            else:
                self.waiting.put(message)
        os._exit(0)

    def tell(self, event: str, data: bytes = b"", **facts: Any) -> None:
        frames.write(self.target, {"event": event, **facts}, data)

    def work(self) -> None:
        """Load what the first message says, then do one request after the other."""
        setup = self.waiting.get()
        pipelines = Pipelines(setup["loading"], setup["models"])
        folder = Path(setup["folder"])
        try:
            plans = {v: describe(p) for v, p in pipelines.plans().items()}
            first = next((v for v, facts in plans.items() if "error" not in facts), "standard")
            pipelines.get(first)  # type: ignore[arg-type]
        except Exception as error:
            self.tell("failed", kind=type(error).__name__, failure=make_failure(error))
            return
        self.tell("ready", plans=plans)
        while True:
            self.answer(self.waiting.get(), pipelines, folder)

    def answer(self, job: frames.Message, pipelines: Pipelines, folder: Path) -> None:
        """Generate, and tell how it ended."""
        try:
            flux = pipelines.get(
                job["variant"], job["fields"].get("acceleration"), lambda m: self.tell("log", message=m)
            )
            fields = {**job["fields"], "images": tuple(Path(p) for p in job["images"])}
            shown = job["previews"] and may_preview(job["fields"], flux)
            result = flux.generate(
                progress=lambda report: self.report(report, shown),
                cancel=lambda: job["id"] in self.cancelled,
                **fields,
            )
            for note in result.notes[len(flux.notes) :]:
                self.tell("log", message=note)
            self.tell("done", answer=keep(result, None if job["fields"].get("sync_mode") else folder))
        except Exception as error:
            if not isinstance(error, Flux2Error):
                traceback.print_exc()
            self.tell("error", failure=make_failure(error))
        self.cancelled.discard(job["id"])

    def report(self, report: Progress, previews: bool) -> None:
        """Pass progress on, with a small JPEG where someone watches."""
        facts: dict[str, Any] = {"stage": report.stage, "step": report.step, "total": report.total, "note": report.note}
        if not previews or report.preview is None or report.step == report.total:
            self.tell("progress", **facts)
            return
        picture, out = report.preview(), io.BytesIO()
        picture.save(out, "JPEG", quality=PREVIEW_QUALITY)
        self.tell("progress", out.getvalue(), size=picture.size, **facts)


def may_preview(fields: dict[str, Any], flux: Flux2) -> bool:
    """Whether steps may be shown: not where a safety checker has still to see the picture."""
    return flux.checkpoint.preset.harmless is not None or not fields.get("enable_safety_checker", True)


def describe(plan: Any) -> dict[str, Any]:
    """A plan, or the error in its place, as plain values."""
    if isinstance(plan, Flux2Error):
        return {"error": str(plan)}
    return {
        "model": plan.model,
        "device": plan.device,
        "dtype": plan.dtype,
        "steps": plan.work.steps,
        "seconds": plan.seconds,
        "plan": str(plan),
    }


def keep(result: Result, folder: Path | None) -> dict[str, Any]:
    """The answer; its pictures lie in ``folder`` under unguessable names, or inside the answer where there is none."""
    answer = result.to_dict()
    for image, told in zip(result.images, answer["images"], strict=True):
        if folder is None:
            told["url"] = f"data:{image.content_type};base64,{base64.b64encode(image.data).decode('ascii')}"
        else:
            told["url"] = f"{secrets.token_urlsafe(24)}{Path(image.file_name).suffix}"
            image.save(folder / told["url"])
    return answer


def main() -> None:
    """Entry point of the process."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    generator = Generator(*frames.standard_streams())
    threading.Thread(target=generator.listen, daemon=True).start()
    generator.work()


if __name__ == "__main__":
    main()
