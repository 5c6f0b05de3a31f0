"""Pictures in and out: encoding with the settings inside, reading them back, reference pictures, cropping."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from .errors import OutputError, RequestError
from .files import home, reason

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
JPEG_QUALITY = 95
WEBP_QUALITY = 95

SETTINGS_KEY = "flux2-local"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_CODE = 8
"""Bytes before an EXIF comment that say how its text is encoded; all zero where none of EXIF's codes fits, as for UTF-8."""

JPEG_SETTINGS_BYTES = 65_000
"""What a JPEG file holds of settings: its EXIF is one segment of at most 65,533 bytes."""

REMOTE = ("http", "https")
MAX_REFERENCE_BYTES = 64 * 2**20
FETCH_SECONDS = 30
MIN_REFERENCE_SIDE = 64
MAX_REFERENCE_ASPECT = 8
MAX_REFERENCE_AREA = 1024 * 1024
"""Larger references are scaled down to this many pixels, as the pipelines do."""


def encode(image: Image.Image, form: str, settings: dict[str, Any]) -> bytes:
    """``image`` as a PNG, JPEG or WebP file with ``settings`` inside (a PNG text chunk; EXIF in the other two). Of settings that are
    too long for a JPEG file, the longest is cut."""
    from PIL import Image, PngImagePlugin

    out = io.BytesIO()
    if form == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text(SETTINGS_KEY, json.dumps(settings, separators=(",", ":")))
        image.save(out, "PNG", pnginfo=info, compress_level=4)
        return out.getvalue()
    while len(text := _utf8(settings)) > JPEG_SETTINGS_BYTES and form == "jpeg":
        longest = max(settings, key=lambda name: len(_utf8(settings[name])))
        settings = {**settings, longest: _halved(settings[longest])}
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = bytes(_CODE) + f"{SETTINGS_KEY}:".encode("ascii") + text
    if form == "jpeg":
        image.save(out, "JPEG", quality=JPEG_QUALITY, exif=exif)
    else:
        image.save(out, "WEBP", quality=WEBP_QUALITY, exif=exif)
    return out.getvalue()


def _utf8(value: Any) -> bytes:
    """JSON; what UTF-8 cannot hold, such as half a file name's surrogate pair, is escaped."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")


def _halved(value: Any) -> Any:
    """Half of a text, or of each text in a list; None in place of what has no half."""
    if isinstance(value, list):
        return [_halved(v) for v in value]
    return value[: len(value) // 2] if isinstance(value, str) else None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that :func:`encode` put into a file.

    Raises:
        RequestError: no such file, not a picture, or a picture without settings.
    """
    image = open_picture(path)
    text = getattr(image, "text", {}).get(SETTINGS_KEY)
    if text is None:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
        comment = comment.encode("latin-1") if isinstance(comment, str) else bytes(comment)
        key, _, value = comment[_CODE:].partition(b":")
        text = value.decode("utf-8", "replace") if key == SETTINGS_KEY.encode("ascii") else None
    try:
        settings = json.loads(text) if text is not None else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(
            f"{path} holds no flux2-local settings. Only pictures that flux2-local wrote, and that no other program saved "
            f"again, carry them."
        )
    return settings


def open_picture(path: Path) -> Image.Image:
    """Open a picture file.

    Raises:
        RequestError: it is not there, not readable or not a picture.
    """
    try:
        return decode(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"The picture {path} cannot be read: {reason(error)}. Give the path of one that is there."
        ) from error


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a picture from memory.

    Raises:
        RequestError: not a picture, truncated, or of an absurd size.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} is not a picture of a kind that is known; use PNG, JPEG or WebP.") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(
            f"{name} is not a picture that can be read ({reason(error)}); use PNG, JPEG or WebP."
        ) from error
    return image


def references(sources: tuple[Any, ...]) -> list[Image.Image]:
    """Load and check reference pictures: paths, http(s) or data URLs, or PIL images.

    Returns:
        RGB pictures, upright; transparent parts are white.

    Raises:
        RequestError: one cannot be read, is under 64 pixels on a side, or longer than 8:1.
    """
    return [_checked(_load(source), i + 1) for i, source in enumerate(sources)]


def _load(source: Any) -> Image.Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Path):
        return open_picture(source)
    if not isinstance(source, str):
        raise RequestError(
            f"images: a reference picture is a path, a URL or a PIL image; {type(source).__name__} was given."
        )
    scheme = scheme_of(source)
    if scheme == "data":
        return decode(data_url_bytes(source), "The data URL")
    if scheme in REMOTE:
        return decode(_fetch(source), source)
    if scheme == "file":
        return open_picture(Path(unquote_to_bytes(urlsplit(source).path).decode("utf-8", "surrogateescape")))
    return open_picture(home(source))


def scheme_of(source: Any) -> str:
    """ "http", "https", "data" or "file" where a reference picture is given by such an address, which is checked; else "".

    Raises:
        RequestError: there can be nothing at that address.
    """
    scheme = source[:6].partition(":")[0].lower() if isinstance(source, str) and ":" in source[:6] else ""
    if scheme in ("file", *REMOTE):
        try:
            problem = _problem_of(source, scheme)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestError(
                f"{source} is no address of a reference picture: {problem}. Write it like https://host/file.png."
            )
    return scheme if scheme in ("data", "file", *REMOTE) else ""


def _problem_of(url: str, scheme: str) -> str:
    """What is wrong with an address; "" for nothing."""
    parts = urlsplit(url)
    if scheme == "file":
        return ""
    odd = re.search(r"[\0- \x7f]", url) or re.search(r"[^!-~]", parts.path + parts.query)
    if odd:
        return f"{odd[0]!r} is written {quote(odd[0])} in one"
    return "" if parts.hostname and parts.port != 0 else "it names no host"  # the port raises unless it is a number


def check_references(sources: tuple[Any, ...]) -> None:
    """Load and check the reference pictures that need not be fetched, and the addresses of the others.

    Raises:
        RequestError: as :func:`references`.
    """
    references(tuple(source for source in sources if scheme_of(source) not in REMOTE))


def data_url_bytes(url: str) -> bytes:
    """The bytes of a ``data:`` URL.

    Raises:
        RequestError: it has no comma or its base64 is broken.
    """
    head, comma, body = url.partition(",")
    if not comma:
        raise RequestError("A data URL needs a comma between its type and its data: data:image/png;base64,….")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise RequestError(f"The data URL's base64 is broken: {error}.") from error


def _fetch(url: str) -> bytes:
    """Fetch a picture that the user named by its address; bounded in size and time."""
    from urllib.request import Request as HttpRequest
    from urllib.request import urlopen

    try:
        with urlopen(HttpRequest(url, headers={"User-Agent": "flux2-local"}), timeout=FETCH_SECONDS) as answer:
            data: bytes = answer.read(MAX_REFERENCE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise RequestError(f"The reference picture {url} could not be fetched: {reason(error)}.") from error
    if len(data) > MAX_REFERENCE_BYTES:
        raise RequestError(f"The reference picture {url} is larger than {MAX_REFERENCE_BYTES // 2**20} MiB.")
    return data


def _checked(image: Image.Image, number: int) -> Image.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    w, h = image.size
    if min(w, h) < MIN_REFERENCE_SIDE or max(w, h) > MAX_REFERENCE_ASPECT * min(w, h):
        raise RequestError(
            f"images: reference picture {number} is {w}×{h} pixels; it must be at least {MIN_REFERENCE_SIDE} pixels on each "
            f"side and at most {MAX_REFERENCE_ASPECT} times as long as wide. Crop or enlarge it."
        )
    return image


def reference_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """The size that a reference of width × height is encoded at: at most one megapixel, multiples of ``multiple``."""
    width, height = _scaled(width, height)
    return width // multiple * multiple, height // multiple * multiple


def _scaled(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, (MAX_REFERENCE_AREA / (width * height)) ** 0.5)
    return int(width * scale), int(height * scale)


def reference_pixels(image: Image.Image, multiple: int) -> torch.Tensor:
    """A reference as the autoencoder reads it: scaled to at most one megapixel, cropped about the centre to whole tokens.

    Returns:
        float32 [1, 3, H, W] in [-1, 1].
    """
    from PIL import Image

    size, cut = _scaled(*image.size), reference_size(*image.size, multiple)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return to_pixels(crop(image, *cut))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 [1, 3, H, W] in [-1, 1]."""
    import numpy as np
    import torch

    array = np.array(image)[None].astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(array).permute(0, 3, 1, 2) - 1.0


def from_pixels(pixels: torch.Tensor) -> Image.Image:
    """[1, 3, H, W] in about [-1, 1] -> RGB picture, clamped and rounded."""
    from PIL import Image

    unit = (pixels[0] * 0.5 + 0.5).clamp(0, 1)
    array = unit.float().cpu().permute(1, 2, 0).numpy()
    return Image.fromarray((array * 255).round().astype("uint8"))


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle ``width`` × ``height`` of a picture that is at least that large."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if image.size != (width, height) else image


def black(image: Image.Image) -> Image.Image:
    """A black picture of the same size."""
    from PIL import Image

    return Image.new("RGB", image.size)


def format_of(path: Path, default: str) -> str:
    """The format that a file name's ending stands for.

    Raises:
        OutputError: an ending that is none of the formats.
    """
    if not path.suffix:
        return default
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path.name}: pictures are written as .png, .jpg or .webp, not {path.suffix}.")
    return FORMATS[path.suffix.lower()]
