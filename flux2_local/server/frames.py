"""What the server and its worker say to each other: JSON messages, each with bytes if need be."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

HEAD = struct.Struct(">II")

Message = dict[str, Any]


def pack(message: Message, data: bytes = b"") -> bytes:
    """A message as bytes: both lengths, the JSON, the data."""
    text = json.dumps(message).encode("ascii")
    return HEAD.pack(len(text), len(data)) + text + data


def read(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """The next message of a blocking stream; None at its end."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    text, data = HEAD.unpack(head)
    return json.loads(stream.read(text)), stream.read(data)


async def receive(stream: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """The next message of an asyncio stream; None at its end."""
    try:
        text, data = HEAD.unpack(await stream.readexactly(HEAD.size))
        return json.loads(await stream.readexactly(text)), await stream.readexactly(data)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
