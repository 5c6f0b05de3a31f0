"""Fetching and calling addresses that somebody else chose: nowhere private, nothing endless, no surprise by redirect.

A name is resolved once and the connection goes to the address that was checked, so that it cannot change in between.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from ..errors import RequestError
from ..files import reason

MAX_REDIRECTS = 4
CHUNK = 65536
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Limits:
    """What one exchange may take.

    Attributes:
        seconds: from the first name lookup to the last byte, redirects included.
        size: bytes of the answer.
        private: whether private addresses may be spoken to.
    """

    seconds: float
    size: int
    private: bool = False


@dataclass(frozen=True)
class Call:
    """One request to send."""

    url: str
    method: str = "GET"
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def exchange(call: Call, limits: Limits) -> tuple[int, bytes]:
    """Send a request, follow redirects, and read the answer; blocking.

    Returns:
        Status and body.

    Raises:
        RequestError: the address is refused or not reachable, or the answer is too large or too slow.
    """
    url = call.url
    alarm = _Alarm(limits.seconds)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            status, location, body = _once(url, call, limits, alarm)
            if status not in REDIRECTS or not location:
                return status, body
            url = urljoin(url, location)
        raise RequestError(f"{call.url} redirects more than {MAX_REDIRECTS} times.")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        why = f"it took longer than {limits.seconds:.0f} s" if alarm.rang else reason(error) or type(error).__name__
        raise RequestError(f"{call.url} cannot be reached: {why}.") from error
    finally:
        alarm.off()


class _Alarm:
    """Closes the current socket when the time is up, whatever the other side does."""

    def __init__(self, seconds: float) -> None:
        self.rang = False
        self.socket: socket.socket | None = None
        self.timer = threading.Timer(seconds, self._ring)
        self.timer.daemon = True
        self.timer.start()

    def watch(self, connection: socket.socket) -> None:
        self.socket = connection
        if self.rang:
            raise TimeoutError

    def _ring(self) -> None:
        self.rang = True
        if self.socket is not None:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def off(self) -> None:
        self.timer.cancel()


def _once(url: str, call: Call, limits: Limits, alarm: _Alarm) -> tuple[int, str | None, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"{url} is not an http or https address.")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    raw = socket.create_connection((resolve(parts.hostname, port, limits.private), port), timeout=limits.seconds)
    alarm.watch(raw)
    try:
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=limits.seconds)
        if parts.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
            alarm.watch(raw)
        connection.sock = raw
        host = parts.netloc.rpartition("@")[2]
        headers = {"Host": host, "User-Agent": "flux2-local", "Connection": "close", **call.headers}
        connection.request(call.method, _target(parts), call.body, headers)
        answer = connection.getresponse()
        body = b"" if answer.status in REDIRECTS else _read(answer, url, limits, alarm)
        return answer.status, answer.headers.get("Location"), body
    finally:
        raw.close()


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _read(answer: http.client.HTTPResponse, url: str, limits: Limits, alarm: _Alarm) -> bytes:
    body = bytearray()
    while chunk := answer.read(CHUNK):
        body += chunk
        if len(body) > limits.size:
            raise RequestError(f"{url} is larger than {limits.size // 2**20} MiB.")
    if alarm.rang:
        raise TimeoutError
    return bytes(body)


def resolve(host: str, port: int, private: bool) -> str:
    """An address of a host that may be spoken to.

    Raises:
        RequestError: one of its addresses is private and that is not allowed.
        OSError: there is no such host.
    """
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    addresses = [str(address).partition("%")[0] for address in found]
    if not private and not all(is_public(address) for address in addresses):
        raise RequestError(
            f"{host} is at a private address, and those are refused so that a request cannot reach into this network. "
            "`flux2-local serve --allow-private-urls` permits them."
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; a 6to4 address is judged by the one inside it too."""
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip.is_reserved:
        return False
    tunnel = ip.sixtofour if isinstance(ip, ipaddress.IPv6Address) else None
    return tunnel is None or is_public(str(tunnel))
