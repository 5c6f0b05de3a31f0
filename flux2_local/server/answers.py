"""Answers in fal's form."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from .failures import make_detail
from .jobs import Job

NOT_BILLED = {"x-fal-billable-units": "0", "X-Fal-Retryable": "false"}
CALLERS_OWN = {"X-Fal-Request-Timeout-Type": "user"}
"""Tells fal's clients that a 504 is the limit they set themselves, and not to be tried again."""


class Answer(Response):
    """JSON in plain ASCII: whatever a caller sent can be echoed, lone surrogates and infinities included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content, allow_nan=False).encode("ascii")
        except ValueError:
            return json.dumps(finite(content), allow_nan=False).encode("ascii")


def finite(value: Any) -> Any:
    """``value`` with infinities and not-a-numbers as text."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def output(job: Job, base: str) -> dict[str, Any]:
    """A job's output, with addresses under ``base`` for its pictures."""
    assert job.answer is not None
    images = [{**image, "url": address(image["url"], base)} for image in job.answer["images"]]
    return {**job.answer, "images": images}


def address(name: str, base: str) -> str:
    """Where a picture of ours is served; data URIs stay."""
    return name if name.startswith("data:") else f"{base}/files/{name}"


def result(job: Job, base: str) -> Answer:
    """A finished job's output, or its failure as an HTTP error."""
    headers = {"x-fal-request-id": job.id}
    if job.failure is None:
        return Answer(output(job, base), headers=headers)
    return failure(job.failure, headers)


def failure(facts: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
    """An error of the tree, as :func:`.failures.make_failure` puts it."""
    body = {"detail": facts["detail"]}
    if facts["status"] == 422:
        return Answer(body, 422, {**NOT_BILLED, **(headers or {})})
    kind = facts["error_type"]
    own = CALLERS_OWN if facts["status"] == 504 else {}
    return Answer({**body, "error_type": kind}, facts["status"], {"x-fal-error-type": kind, **own, **(headers or {})})


def invalid(errors: list[Any]) -> Answer:
    """pydantic's findings about a body."""
    return Answer({"detail": [make_detail(e) for e in errors]}, 422, NOT_BILLED)


def problem(status: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> Answer:
    """Any other error."""
    return Answer({"detail": detail, "error_type": kind}, status, {"x-fal-error-type": kind, **(headers or {})})
