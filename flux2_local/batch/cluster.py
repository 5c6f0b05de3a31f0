"""Workers of a Ray cluster, on one machine or many: an actor per GPU, or per so many processor threads.

Ray finds a place for each, asks its autoscaler for machines where there are too few, and says when one is lost.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .. import frames
from ..errors import BackendUnavailableError, Flux2Error, PlanError
from .engines import batch_of, facts_of, rebuilt, unpacked
from .worker import failure, load, made

if TYPE_CHECKING:
    from ..request import Request
    from ..result import Result
    from .engines import Answer
    from .job import Picture
    from .manifest import Record


def require_ray() -> Any:
    """The module ``ray``, told to send no usage statistics.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            "--engine ray needs Ray, which is not installed: pip install 'flux2-local[ray]', on every machine of the cluster."
        ) from error
    return ray


class Painter:
    """What runs in the cluster: one loaded model. It says what went wrong instead of raising it.

    Args:
        loading: arguments of :meth:`flux2_local.Flux2.load`.
        threads: processor threads to use.
    """

    def __init__(self, loading: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.loading = loading

    def load(self) -> frames.Message:
        try:
            self.flux = load(self.loading)
        except Flux2Error as error:
            return failure(error)
        return facts_of(self.flux)

    def batch(self, fields: dict[str, Any]) -> int:
        from ..request import make_request

        return batch_of(self.flux, make_request(self.flux.settings.variant, fields))

    def make(self, requests: list[dict[str, Any]]) -> list[Answer]:
        try:
            return list(made(self.flux, requests))
        except Flux2Error as error:
            return [(failure(error), b"")] * len(requests)


class ClusterWorker:
    """A worker that is an actor of a Ray cluster.

    Args:
        loading: arguments of :meth:`flux2_local.Flux2.load`.
        threads: processor threads that it uses.
        gpus: cards that it needs, 0 or 1.
    """

    def __init__(self, loading: dict[str, Any], threads: int, gpus: int) -> None:
        self.loading, self.threads, self.gpus = loading, threads, gpus
        self.facts: Record = {}
        self._actor: Any = None

    def start(self) -> None:
        ray = require_ray()
        # Without a card a worker holds as many processors as it has threads, with one a single processor.
        actor = ray.remote(num_gpus=self.gpus, num_cpus=1 if self.gpus else self.threads)(Painter)
        self._actor = actor.remote(self.loading, self.threads)
        try:
            told = self._answer(self._actor.load.remote())
        except ConnectionError as error:
            raise Flux2Error("A worker of the Ray cluster ended while it loaded the model.") from error
        if "error" in told:
            raise rebuilt(told)
        self.facts = told

    def batch(self, request: Request) -> int:
        told: int = self._answer(self._actor.batch.remote(request.model_dump(mode="json")))
        return told

    def make(self, group: list[Picture]) -> list[Result | Flux2Error]:
        requests = [picture.request.model_dump(mode="json") for picture in group]
        return [unpacked(*answer) for answer in self._answer(self._actor.make.remote(requests))]

    def stop(self) -> None:
        if self._actor is not None:
            require_ray().kill(self._actor)

    def _answer(self, reference: Any) -> Any:
        """What the actor gives.

        Raises:
            ConnectionError: it died.
        """
        ray = require_ray()
        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise ConnectionError from error


def cluster_workers(loading: dict[str, Any], count: int | None, threads: int | None) -> list[ClusterWorker]:
    """Workers of the cluster that this machine belongs to (``RAY_ADDRESS``), or of one on this machine alone.

    Args:
        loading: arguments of :meth:`flux2_local.Flux2.load`; a device of "cpu" uses no cards.
        count: how many; as many as there is room for now where None. More than that wait for machines to join.
        threads: processor threads of each; as many as torch takes here where None.

    Raises:
        BackendUnavailableError: Ray is not installed.
        PlanError: the cluster has no room for one.
    """
    import torch

    ray = require_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    there = ray.cluster_resources()
    gpus = 0 if loading.get("device") == "cpu" else int(there.get("GPU", 0) > 0)
    threads = threads or torch.get_num_threads()
    room = int(there["GPU"]) if gpus else int(there.get("CPU", 0)) // threads
    if not (count or room):
        raise PlanError(
            f"The Ray cluster has {there.get('CPU', 0):g} processors and a worker takes {threads}. Say --threads with fewer, or "
            f"--workers to wait for machines that join."
        )
    loading = {**loading, "device": "cuda" if gpus else loading.get("device", "cpu")}
    return [ClusterWorker(loading, threads, gpus) for _ in range(count or room)]
