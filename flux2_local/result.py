"""What a call gives back: fal.ai's flux-2 output schema, with the pictures in memory."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, images

if TYPE_CHECKING:
    from PIL import Image

    from .plan import Plan


@dataclass(frozen=True)
class Timings:
    """Seconds per stage; stages that did not run are 0.

    ``inference`` is everything from the prompt to the pixels: encode, references, denoise and decode.
    """

    expand: float = 0.0
    encode: float = 0.0
    references: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    safety: float = 0.0
    finish: float = 0.0

    @property
    def inference(self) -> float:
        return self.encode + self.references + self.denoise + self.decode

    @property
    def total(self) -> float:
        return self.expand + self.inference + self.safety + self.finish

    def to_dict(self) -> dict[str, float]:
        stages = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: round(v, 4) for k, v in {"inference": self.inference, "total": self.total, **stages}.items()}


@dataclass(frozen=True)
class ImageFile:
    """One picture, encoded in the format that was asked for, with its settings inside.

    Attributes:
        data: the file's bytes.
        width, height: pixels.
        content_type: "image/png", "image/jpeg" or "image/webp".
        file_name: a name for it, unique to prompt and seed.
        settings: what the file's metadata says (model, variant, seed and every field of the request).
        path: where it was kept, or None.
    """

    data: bytes = field(repr=False)
    width: int
    height: int
    content_type: str
    file_name: str
    settings: dict[str, Any] = field(repr=False)
    path: Path | None = None

    @property
    def file_size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def url(self) -> str:
        """A ``file://`` URL where the picture was kept, else a data URI."""
        if self.path is not None:
            return self.path.resolve().as_uri()
        return f"data:{self.content_type};base64,{base64.b64encode(self.data).decode('ascii')}"

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data))

    def save(self, path: str | Path) -> Path:
        """Write the picture; the ending (.png, .jpg, .webp) chooses the format. Whole or not at all.

        Raises:
            OutputError: another ending, or the file cannot be written.
        """
        path = files.home(path)
        own = self.content_type.removeprefix("image/")
        form = images.format_of(path, own)
        data = self.data if form == own else images.encode(self.image.convert("RGB"), form, self.settings)
        return files.write(path, data)

    def kept(self, folder: Path) -> ImageFile:
        """This picture, written into ``folder`` under its own name (or that name with a number, if it is taken)."""
        path = files.free_name(folder / self.file_name)
        files.write(path, self.data)
        return replace(self, path=path, file_name=path.name)

    def to_dict(self) -> dict[str, Any]:
        names = ("url", "content_type", "file_name", "file_size", "width", "height")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Result:
    """What :meth:`flux2_local.Flux2.generate` returns.

    Attributes:
        images: the pictures, in order of their seeds.
        timings: seconds per stage.
        seed: of the first picture; picture i was made from seed + i.
        has_nsfw_concepts: per picture, whether the safety check flagged it (it is black then).
        prompt: what was drawn: the request's prompt, or its expansion.
        notes: what the user should know, a line each.
        plan: by which the pictures were made, with what was predicted for this request; None where another process made them.
    """

    images: tuple[ImageFile, ...]
    timings: Timings
    seed: int
    has_nsfw_concepts: tuple[bool, ...]
    prompt: str
    notes: tuple[str, ...] = ()
    plan: Plan | None = field(default=None, repr=False)

    def kept(self, folder: Path) -> Result:
        """This result with every picture written into ``folder``."""
        return replace(self, images=tuple(image.kept(folder) for image in self.images))

    def to_dict(self) -> dict[str, Any]:
        """The output as fal's API gives it."""
        return {
            "images": [image.to_dict() for image in self.images],
            "timings": self.timings.to_dict(),
            "seed": self.seed,
            "has_nsfw_concepts": list(self.has_nsfw_concepts),
            "prompt": self.prompt,
        }
