"""Addresses of this server as a caller knows them."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from .jobs import Job


def file_base(request: Request) -> str:
    """Where pictures are served for this caller: in plain HTTP, since image libraries know nothing of the local CA."""
    url = request.base_url
    plain: int | None = request.app.state.plain_port
    if url.scheme == "https" and plain is not None:
        host = urlsplit(str(url)).hostname or "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{plain}"
    return str(url).rstrip("/")


def own_bases(request: Request) -> tuple[str, ...]:
    """Every address that this caller may know our pictures by: the one it calls, and this machine's names."""
    port = urlsplit(file_base(request)).port
    names = (f"http://{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]"))
    return file_base(request), str(request.base_url).rstrip("/"), *names


def queue_urls(request: Request, job: Job) -> dict[str, str]:
    """The three addresses that belong to a queued request."""
    root = f"{str(request.base_url).rstrip('/')}/queue/{job.endpoint}/requests/{job.id}"
    return {"response_url": root, "status_url": f"{root}/status", "cancel_url": f"{root}/cancel"}
