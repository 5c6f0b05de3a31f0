"""FLUX.2 image generation on your own machine, as fast as that machine can.

>>> from flux2_local import Flux2                                    # doctest: +SKIP
>>> flux = Flux2.load(variant="turbo")                               # doctest: +SKIP
>>> flux.generate("a lighthouse at dusk", seed=7).images[0].save("lighthouse.png")  # doctest: +SKIP

Importing this package imports nothing heavy; torch comes with the first :meth:`Flux2.load`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import (
        BackendUnavailableError,
        BudgetError,
        Cancelled,
        DownloadError,
        Flux2Error,
        ModelError,
        OutOfMemoryError,
        OutputError,
        PickleRefusedError,
        PlanError,
        RequestError,
        SafetyUnavailableError,
        UnknownModelError,
        WeightsDamagedError,
        WeightsMissingError,
    )
    from .pipeline import Flux2
    from .plan import Plan
    from .progress import Progress
    from .request import ImageSize, Request
    from .result import ImageFile, Result, Timings

_HOME = {
    "Flux2": "pipeline",
    "Plan": "plan",
    "Progress": "progress",
    "Request": "request",
    "ImageSize": "request",
    "Result": "result",
    "ImageFile": "result",
    "Timings": "result",
    "Flux2Error": "errors",
    "RequestError": "errors",
    "ModelError": "errors",
    "UnknownModelError": "errors",
    "WeightsMissingError": "errors",
    "WeightsDamagedError": "errors",
    "PickleRefusedError": "errors",
    "DownloadError": "errors",
    "PlanError": "errors",
    "BudgetError": "errors",
    "BackendUnavailableError": "errors",
    "SafetyUnavailableError": "errors",
    "OutputError": "errors",
    "OutOfMemoryError": "errors",
    "Cancelled": "errors",
}

__all__ = [
    "BackendUnavailableError",
    "BudgetError",
    "Cancelled",
    "DownloadError",
    "Flux2",
    "Flux2Error",
    "ImageFile",
    "ImageSize",
    "ModelError",
    "OutOfMemoryError",
    "OutputError",
    "PickleRefusedError",
    "Plan",
    "PlanError",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "SafetyUnavailableError",
    "Timings",
    "UnknownModelError",
    "WeightsDamagedError",
    "WeightsMissingError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
