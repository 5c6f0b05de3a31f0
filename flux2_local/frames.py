"""What a process and its worker say to each other: JSON messages, each with bytes if need be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

HEAD = struct.Struct(">II")

Message = dict[str, Any]


def pack(message: Message, data: bytes = b"") -> bytes:
    """A message as bytes: both lengths, the JSON, the data."""
    text = json.dumps(message).encode("ascii")
    return HEAD.pack(len(text), len(data)) + text + data


def write(stream: BinaryIO, message: Message, data: bytes = b"") -> None:
    """Send a message at once."""
    stream.write(pack(message, data))
    stream.flush()


def read(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """The next message of a blocking stream; None at its end, which may come within a message."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    text, data = HEAD.unpack(head)
    body = stream.read(text + data)
    return (json.loads(body[:text]), body[text:]) if len(body) == text + data else None


async def receive(stream: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """The next message of an asyncio stream; None at its end."""
    try:
        text, data = HEAD.unpack(await stream.readexactly(HEAD.size))
        return json.loads(await stream.readexactly(text)), await stream.readexactly(data)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """A worker process's standard input and output for messages alone: what a library prints goes to standard error, and Ctrl-C,
    which reaches the whole group, is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, target


def work(serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """A worker process from its start until its parent has no more messages, or is gone."""
    try:
        serve(*standard_streams())
    except BrokenPipeError:
        os._exit(1)
