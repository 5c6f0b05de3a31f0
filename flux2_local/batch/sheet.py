"""A batch at a glance: a contact sheet, and a gallery in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from .. import files
from ..errors import OutputError, RequestError
from . import manifest as manifests
from .manifest import Record
from .stores import find_manifest, load_picture

if TYPE_CHECKING:
    from PIL import Image

MARGIN = 8
LABEL = 18
THUMB_QUALITY = 80

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }}
body {{ margin: 1.5rem }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({side}px, 1fr)); gap: 1rem }}
figure {{ margin: 0; overflow-wrap: anywhere }}
img {{ max-width: 100%; height: auto; border-radius: 4px; display: block }}
figcaption small {{ opacity: .7; display: block }}
input {{ font: inherit; padding: .4em; width: min(30rem, 90%); margin-bottom: 1rem }}
</style></head><body>
<h1>{title}</h1><p>{count}</p>
<input type="search" placeholder="prompt, seed or line" aria-label="Show only pictures that match">
<main>
{figures}
</main>
<script>
const figures = [...document.querySelectorAll("figure")];
document.querySelector("input").addEventListener("input", (event) => {{
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const f of figures) f.hidden = !words.every((w) => f.textContent.toLowerCase().includes(w));
}});
</script></body></html>
"""

FIGURE = """<figure><a{link}><img loading="lazy" width="{width}" height="{height}" alt="{prompt}" src="{source}"></a>
<figcaption>{prompt}<small>{facts}</small></figcaption></figure>"""


def thumbnails(manifest: Path, side: int, limit: int) -> list[tuple[Record, Image.Image]]:
    """The first ``limit`` pictures, at most ``side`` pixels long, in the order of their lines.

    Raises:
        OutputError: the manifest, or a picture that it names, cannot be read.
    """
    from .. import images

    found = []
    for record in islice(manifests.read(manifest), limit):
        picture = images.decode(load_picture(manifest, record).getvalue(), record["file_name"]).convert("RGB")
        picture.thumbnail((side, side))
        found.append((record, picture))
    return sorted(found, key=lambda pair: (pair[0]["line"], pair[0]["picture"]))


def draw_sheet(thumbs: list[tuple[Record, Image.Image]], columns: int, side: int) -> Image.Image:
    """All thumbnails on one picture, with line and seed below each."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(thumbs))
    rows = -(-len(thumbs) // columns)
    width, height = side + MARGIN, side + LABEL + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (record, thumb) in enumerate(thumbs):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        sheet.paste(thumb, (left + (side - thumb.width) // 2, top + (side - thumb.height) // 2))
        draw.text((left, top + side + 3), f"line {record['line']}  seed {record['seed']}", fill="black")
    return sheet


def write_gallery(thumbs: list[tuple[Record, Image.Image]], manifest: Path, target: Path, side: int) -> str:
    """A page with every thumbnail inside; each leads to its full picture where that is a file."""
    figures = []
    for record, thumb in thumbs:
        data = io.BytesIO()
        thumb.save(data, "JPEG", quality=THUMB_QUALITY)
        full = (manifest.parent / record["file_name"]).absolute()
        base = target.absolute().parent
        near = full.is_relative_to(base) and "shard" not in record
        link = f' href="{html.escape(quote(full.relative_to(base).as_posix()))}"' if near else ""
        words = f"line {record['line']}, seed {record['seed']}, {record['width']}×{record['height']}, {record['steps']} steps"
        source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
        prompt = html.escape(record["prompt"])
        figures.append(
            FIGURE.format(
                link=link,
                width=thumb.width,
                height=thumb.height,
                prompt=prompt,
                source=source,
                facts=html.escape(words),
            )
        )
    title = html.escape(target.absolute().parent.name or "pictures")
    return PAGE.format(title=title, side=side, count=f"{len(thumbs)} pictures", figures="\n".join(figures))


def make_sheets(
    folder: Path,
    sheet: Path,
    gallery: Path,
    *,
    columns: int = 6,
    side: int = 256,
    limit: int = 500,
    overwrite: bool = False,
) -> tuple[Path, Path, int]:
    """Draw a batch's contact sheet and write its gallery.

    Args:
        folder: that ``flux2-local batch`` wrote, of any layout.
        sheet, gallery: files to write.
        columns: pictures side by side on the sheet.
        side: of a thumbnail, in pixels.
        limit: pictures at most.
        overwrite: write over files that are there.

    Returns:
        Both files, and how many pictures are on them.

    Raises:
        OutputError: there is no batch, it is empty, or a file is there already or cannot be written.
        RequestError: a number out of range.
    """
    from .. import images

    if not (1 <= columns <= 100 and 16 <= side <= 1024 and 1 <= limit <= 10_000):
        raise RequestError("--columns goes from 1 to 100, --thumb from 16 to 1024 and --limit from 1 to 10000.")
    for path in (sheet, gallery):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists. Say --overwrite, or name other files.")
    form = images.format_of(sheet, "png")
    manifest = find_manifest(folder)
    thumbs = thumbnails(manifest, side, limit)
    if not thumbs:
        raise OutputError(f"{manifest} names no finished picture yet.")
    files.write(sheet, images.encode(draw_sheet(thumbs, columns, side), form, {"sheet": len(thumbs)}))
    files.write(gallery, write_gallery(thumbs, manifest, gallery, side).encode())
    return sheet, gallery, len(thumbs)
