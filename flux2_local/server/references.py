"""``image_urls`` -> pictures in our own folder, before a request is queued."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from ..errors import RequestError
from ..images import MAX_REFERENCE_ASPECT, MIN_REFERENCE_SIDE, data_url_bytes
from ..request import MAX_REFERENCES
from .outgoing import Call, Limits, exchange
from .pictures import Pictures

FETCH = Limits(seconds=20, size=32 * 2**20)
MAX_PIXELS = 64_000_000
FORMS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}


async def collect(urls: list[Any], pictures: Pictures, own: Iterable[str], private: bool) -> list[str]:
    """Fetch and check every picture; returns the names of their files.

    Args:
        urls: data URIs, http(s) addresses, or addresses of pictures that this server serves.
        pictures: where they are kept.
        own: this server's own addresses, whose files are read from the disk.
        private: whether private addresses may be fetched from.

    Raises:
        RequestError: naming the picture that cannot be had and why; none is kept then.
    """
    if len(urls) > MAX_REFERENCES:
        raise _wrong(f"at most {MAX_REFERENCES} pictures, {len(urls)} were given", None, urls[0], "too_long")
    limits = Limits(FETCH.seconds, FETCH.size, private)
    jobs = (asyncio.to_thread(_keep, i, url, pictures, tuple(own), limits) for i, url in enumerate(urls))
    found = await asyncio.gather(*jobs, return_exceptions=True)
    names = [name for name in found if isinstance(name, str)]
    for problem in found:
        if isinstance(problem, BaseException):
            pictures.remove(names)
            raise problem
    return names


def _keep(number: int, url: Any, pictures: Pictures, own: tuple[str, ...], limits: Limits) -> str:
    if not isinstance(url, str):
        raise _wrong("a picture is given by its URL", number, url, "string_type")
    try:
        data = _bytes(url, pictures, own, limits)
        return pictures.add(data, form_of(data))
    except RequestError as error:
        raise _wrong(str(error), number, url, "file_download_error") from error


def _bytes(url: str, pictures: Pictures, own: tuple[str, ...], limits: Limits) -> bytes:
    if url[:5].lower() == "data:":
        return data_url_bytes(url)
    if any(url.startswith(f"{base}/files/") for base in own):
        try:
            return pictures.path(urlsplit(url).path.rpartition("/")[2]).read_bytes()
        except (KeyError, OSError) as error:
            raise RequestError(f"{url} is not here, or not any more.") from error
    status, data = exchange(Call(url), limits)
    if status != 200:
        raise RequestError(f"{url} answered {status}.")
    return data


def form_of(data: bytes) -> str:
    """The format of a picture, from its beginning.

    Raises:
        RequestError: not one of the three formats, or a size that cannot be used.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            form, (width, height) = image.format or "", image.size
    except Exception as error:
        raise RequestError("This is not a picture that can be read; use PNG, JPEG or WebP.") from error
    if form not in FORMS:
        raise RequestError(f"{form} pictures are not taken; use PNG, JPEG or WebP.")
    if min(width, height) < MIN_REFERENCE_SIDE or max(width, height) > MAX_REFERENCE_ASPECT * min(width, height):
        raise RequestError(
            f"The picture is {width}×{height}; it must be at least {MIN_REFERENCE_SIDE} pixels on each side and at most "
            f"{MAX_REFERENCE_ASPECT} times as long as wide."
        )
    if width * height > MAX_PIXELS:
        raise RequestError(f"The picture is {width}×{height}; at most {MAX_PIXELS // 10**6} megapixels are taken.")
    return FORMS[form]


def _wrong(message: str, number: int | None, given: Any, kind: str) -> RequestError:
    loc = ["image_urls"] if number is None else ["image_urls", number]
    return RequestError(f"image_urls: {message}", [{"loc": loc, "msg": message, "type": kind, "input": given}])
