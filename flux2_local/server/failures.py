"""The error tree in HTTP: one table. 429 and 503 are avoided, since fal's clients repeat those calls by themselves."""

from __future__ import annotations

from typing import Any

from .. import errors

STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.RequestError, 422, "invalid_request"),
    (errors.UnknownModelError, 404, "model_not_served"),
    (errors.ModelError, 500, "model_unavailable"),
    (errors.OutOfMemoryError, 500, "out_of_memory"),
    (errors.PlanError, 500, "does_not_fit"),
    (errors.SafetyUnavailableError, 400, "safety_checker_unavailable"),
    (errors.OutputError, 500, "storage_failed"),
    (errors.Cancelled, 499, "client_cancelled"),
    (errors.Flux2Error, 500, "internal_error"),
    (Exception, 500, "internal_error"),
)
"""Kind of error, HTTP status, ``error_type``; the first row that fits counts."""

DOCS = "https://docs.pydantic.dev/latest/errors/validation_errors"
LONGEST_INPUT = 500


def make_failure(error: Exception) -> dict[str, Any]:
    """An error as plain values: ``status``, ``error_type``, ``detail`` (fal's list for a wrong field) and ``message``."""
    status, kind = next((s, k) for cls, s, k in STATUS if isinstance(error, cls))
    message = str(error) or type(error).__name__
    detail: Any = message
    if isinstance(error, errors.RequestError):
        detail = [make_detail({**d, "loc": ("body", *d.get("loc", ()))}) for d in error.details]
    return {"status": status, "error_type": kind, "detail": detail, "message": message}


def told(status: int, kind: str, text: str) -> dict[str, Any]:
    """A failure that no error of the tree stands for."""
    return {"status": status, "error_type": kind, "detail": text, "message": text}


def make_detail(found: dict[str, Any]) -> dict[str, Any]:
    """One of pydantic's findings as fal's 422 answers give it; what was sent is echoed only as far as it is short."""
    kind = str(found.get("type", "value_error"))
    out: dict[str, Any] = {"loc": list(found.get("loc", ())), "msg": str(found.get("msg", "")), "type": kind}
    if "ctx" in found:
        out["ctx"] = {k: echo(v) for k, v in found["ctx"].items()}
    if "input" in found:
        out["input"] = echo(found["input"])
    return {**out, "url": f"{DOCS}#{kind}"}


def echo(value: Any) -> Any:
    """A value that a caller sent, cut to what an answer can carry."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_INPUT else f"{text[:LONGEST_INPUT]}…"
