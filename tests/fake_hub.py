"""A small hub on loopback: lists a repository, serves its files in ranges, refuses gated ones, and can break off."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name: their files by path. ``gated`` names answer 403; ``budget`` bytes are sent, then all stops."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    budget: float = float("inf")
    ranges: list[tuple[str, int]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, call: BaseHTTPRequestHandler, body: bool) -> None:
        path = call.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo not in self.repos:
                return self.refuse(call, 404, "RepoNotFound")
            if "/tree/" in path:
                return self.send(call, json.dumps(self.tree(repo)).encode(), {}, 200, True)
            listing = {"id": repo, "sha": SHA, "siblings": [{"rfilename": n} for n in self.repos[repo]]}
            return self.send(call, json.dumps(listing).encode(), {}, 200, True)
        repo, name = "/".join(path.split("/")[:2]), "/".join(path.split("/")[4:])
        if repo not in self.repos or name not in self.repos[repo]:
            return self.refuse(call, 404, "EntryNotFound")
        if repo in self.gated:
            return self.refuse(call, 403, "GatedRepo")
        data = self.repos[repo][name]
        start = 0
        if body and call.headers.get("Range"):
            start = int(call.headers["Range"].split("=")[1].split("-")[0])
            self.ranges.append((name, start))
        if body:
            self.fetched.append(name)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(call, data[start:], headers, 206 if start else 200, body)

    def tree(self, repo: str) -> list[dict[str, object]]:
        files = self.repos[repo].items()
        return [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files]

    def refuse(self, call: BaseHTTPRequestHandler, code: int, reason: str) -> None:
        call.send_response(code)
        call.send_header("X-Error-Code", reason)
        call.send_header("X-Error-Message", reason)
        call.send_header("Content-Length", "0")
        call.end_headers()

    def send(self, call: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], code: int, body: bool) -> None:
        call.send_response(code)
        for name, value in headers.items():
            call.send_header(name, value)
        call.send_header("Content-Length", str(len(data)))
        call.end_headers()
        if body:
            part = data[: int(min(len(data), max(0, self.budget)))]
            self.budget -= len(part)
            call.wfile.write(part)
            if len(part) < len(data):
                call.close_connection = True
                call.connection.close()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files by their relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
