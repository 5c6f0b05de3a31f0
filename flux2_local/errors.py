"""The error tree. Every message says what is wrong, why, and what to do about it.

::

    Flux2Error
    ├── RequestError          a field of a request is missing or out of range (also a ValueError)
    ├── ModelError
    │   ├── UnknownModelError     no such model, and nothing at that path
    │   ├── WeightsMissingError   a known model whose weights are not on this disk
    │   ├── WeightsDamagedError   a file is truncated, unreadable or does not fit the architecture
    │   ├── PickleRefusedError    a file type that can run code when it is read
    │   └── DownloadError         the hub said no, or the line broke
    ├── PlanError
    │   ├── BudgetError           no plan fits the memory given
    │   └── BackendUnavailableError   a backend named explicitly cannot run here
    ├── SafetyUnavailableError    the safety check was asked for and has no weights
    ├── OutputError           the target cannot be written (checked before anything is generated)
    ├── OutOfMemoryError      the device ran out of memory while running (also a MemoryError)
    └── Cancelled             the caller cancelled; nothing was written
"""

from __future__ import annotations

from typing import Any

OUT_OF_MEMORY = (
    "out of memory",  # torch's allocators, CUDA, Triton
    "not enough memory",  # torch's on a CPU
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "ALLOCATION_FAILED",  # cuDNN 9
)
"""What errors say that mean it."""


class Flux2Error(Exception):
    """Base of every error that flux2-local raises on purpose."""


class RequestError(Flux2Error, ValueError):
    """A request that cannot be served.

    Attributes:
        details: one dict per problem, as pydantic and fal's 422 answers give them: ``loc``, ``msg``, ``type``,
            ``input`` and, where there is a bound, ``ctx``.
    """

    def __init__(self, message: str, details: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.details = details or [{"loc": [], "msg": message, "type": "value_error"}]


class ModelError(Flux2Error):
    """Something about a model's files."""


class UnknownModelError(ModelError):
    """The name is not in ``configs/models.toml``, not a hub id on this disk, and not a path."""


class WeightsMissingError(ModelError):
    """The model is known and its weights are not here."""


class WeightsDamagedError(ModelError):
    """A weights file that cannot be read, or whose tensors do not fit the model."""


class PickleRefusedError(ModelError):
    """Pickle files (.bin, .pt, .pth, .ckpt) can run any code when they are loaded, so they never are."""


class DownloadError(ModelError):
    """A download that did not work; what had arrived is kept and the next try goes on from there."""


class PlanError(Flux2Error):
    """No way of running was found."""


class BudgetError(PlanError):
    """No plan fits the memory budget.

    Attributes:
        smallest: bytes of the smallest budget that would do.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class BackendUnavailableError(PlanError):
    """A backend named explicitly is not installed or does not run on this device."""


class SafetyUnavailableError(Flux2Error):
    """The safety check was asked for, and no classifier is on this machine."""


class OutputError(Flux2Error):
    """The place to write to is missing, read-only or full."""


class OutOfMemoryError(Flux2Error, MemoryError):
    """The device ran out of memory."""


class Cancelled(Flux2Error):
    """The caller's cancel callback asked to stop."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory ran out, by what torch, CUDA's libraries and Triton say then."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
