"""What Prometheus may read at ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .jobs import Job

SECONDS = (0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        names = ["endpoint", "outcome"]
        self.jobs = Counter("flux2_requests", "Requests that have ended", names, registry=registry)
        self.images = Counter("flux2_images", "Pictures made", ["endpoint"], registry=registry)
        self.waiting = Gauge("flux2_queue_waiting", "Requests that wait", registry=registry)
        self.busy = Gauge("flux2_worker_busy", "Whether a request runs", registry=registry)
        self.starts = Gauge("flux2_worker_starts", "Times the worker process was started", registry=registry)
        self.answers = Counter("flux2_http_answers", "HTTP answers", ["status"], registry=registry)
        self.inference = Histogram(
            "flux2_inference_seconds", "From prompt to pixels", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.queued = Histogram("flux2_queue_seconds", "From submission to start", buckets=SECONDS, registry=registry)

    def end(self, job: Job) -> None:
        """Count a job that has ended."""
        outcome = "ok" if job.failure is None else str(job.failure["error_type"])
        self.jobs.labels(job.endpoint, outcome).inc()
        if job.started is not None:
            self.queued.observe(max(0.0, job.started - job.created))
        if job.answer is not None:
            self.images.labels(job.endpoint).inc(len(job.answer["images"]))
            self.inference.labels(job.endpoint).observe(job.answer["timings"]["inference"])

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
