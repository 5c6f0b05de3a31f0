"""Which engine makes the pictures of a job, from what the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RequestError

if TYPE_CHECKING:
    from ..pipeline import Flux2
    from .engines import Pool
    from .run import Engine

Lines = tuple[str, ...]


@dataclass(frozen=True)
class EngineChoice:
    """Which engine is wanted.

    Attributes:
        loading: arguments of :meth:`flux2_local.Flux2.load`.
        engine: "local" or "ray".
        devices: one process for each; none for this process alone.
        workers: of a Ray cluster; as many as there is room for where None.
        threads: processor threads of each process.

    Raises:
        RequestError: options that do not go together.
        BackendUnavailableError: Ray is wanted and not installed.
    """

    loading: dict[str, Any]
    engine: str
    devices: list[str]
    workers: int | None
    threads: int | None

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise RequestError(f"--engine must be local or ray; {self.engine!r} was given.")
        if self.engine == "ray" and self.devices:
            raise RequestError("--devices is for --engine local; Ray gives each of its --workers a card.")
        if self.engine == "local" and self.workers is not None:
            raise RequestError("--workers is for --engine ray; --devices names one process per device here.")
        for name, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1; {value} was given.")
        if self.engine == "ray":
            from .cluster import require_ray

            require_ray()

    @contextmanager
    def loaded(self, cancel: Callable[[], bool]) -> Iterator[tuple[Engine, Lines]]:
        """The engine, with its model loaded, and what to know about it, a line each.

        Args:
            cancel: asked now and then; True stops.

        Raises:
            Flux2Error: as :meth:`flux2_local.Flux2.load`.
        """
        import torch

        from ..pipeline import Flux2
        from .engines import Pool, ThisProcess, processes

        if self.engine == "ray":
            from .cluster import cluster_workers

            with Pool(cluster_workers(self.loading, self.workers, self.threads), cancel, gradual=True) as pool:
                yield pool, about_pool(pool, "workers of a Ray cluster")
        elif self.devices:
            with Pool(processes(self.devices, self.loading, self.threads), cancel) as pool:
                yield pool, about_pool(pool, "processes, one per device")
        else:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            flux = Flux2.load(**self.loading)
            yield ThisProcess(flux, cancel), about_model(flux)


def about_model(flux: Flux2) -> Lines:
    """Which model runs, and what to know about it."""
    plan = flux.plan
    runs = f"{flux.checkpoint.preset.title} ({plan.variant}, {plan.acceleration}) on {plan.device} in {plan.dtype}"
    return (runs, *(f"note: {note}" for note in flux.notes))


def about_pool(pool: Pool, what: str) -> Lines:
    """Which model runs in how many of ``what``."""
    fixed = pool.facts["fixed"]
    return (f"{fixed['model']} ({fixed['variant']}) in {len(pool.workers)} {what}",)
