"""What a running generation tells its caller, and how the caller stops it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import Cancelled

if TYPE_CHECKING:
    from PIL import Image

Stage = Literal["load", "expand", "encode", "references", "denoise", "decode", "safety", "finish"]


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes:
        stage: which part of the work is going on.
        step, total: finished and all units of this stage (denoising steps over all images; 0 of 1 where a stage is one unit).
        note: a line for the user, or "".
        preview: during denoising, draws a small picture of the image being made from the current latents; None elsewhere.
    """

    stage: Stage
    step: int = 0
    total: int = 1
    note: str = ""
    preview: Callable[[], Image.Image] | None = None


OnProgress = Callable[[Progress], Any]
CancelCheck = Callable[[], bool]


@dataclass(frozen=True)
class Reporter:
    """The caller's two callbacks, bundled for the stages. Either may be absent."""

    on_progress: OnProgress | None = None
    cancelled: CancelCheck | None = None

    def __call__(self, report: Progress) -> None:
        """Report, after giving the caller the chance to stop.

        Raises:
            Cancelled: the cancel callback returned True.
        """
        self.stop()
        if self.on_progress is not None:
            self.on_progress(report)

    def stop(self) -> None:
        """Give the caller the chance to stop, where there is nothing to report.

        Raises:
            Cancelled: as above.
        """
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("Cancelled by the caller; nothing was written.")
