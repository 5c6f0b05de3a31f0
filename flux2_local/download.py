"""Fetching models from the hub into its cache, only ever on request. Large files go on inside where they broke off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from .errors import DownloadError, UnknownModelError
from .files import reason
from .presets import models
from .store import COMPONENTS, SAFETY_MODEL

MODEL_PATTERNS = (
    "model_index.json",
    *(
        f"{part}/*.{end}"
        for part in (*COMPONENTS, "scheduler")
        for end in ("json", "safetensors", "jinja", "txt", "model")
    ),
)
"""The pipeline's own files: neither the second copy of the transformer in one file, nor pickles, nor pictures."""

SAFETY_PATTERNS = ("config.json", "preprocessor_config.json", "model.safetensors")

HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "hf_xet")
"""What the hub's client has used over time; errors of theirs are errors of the line."""

LARGE = 16 * 2**20
"""Files above this are fetched by :func:`fetch_large`; the hub's client starts a broken file again from its beginning."""

CHUNK = 2**20
TIMEOUT = 30


@dataclass(frozen=True)
class Part:
    """One thing that a download brings: a repository and the patterns of the files wanted from it."""

    repo: str
    patterns: tuple[str, ...]
    purpose: Literal["model", "LoRA", "safety check"]


SAFETY_PART = Part(SAFETY_MODEL, SAFETY_PATTERNS, "safety check")


def parts_of(model: str) -> list[Part]:
    """What ``flux2-local download model`` fetches: the model, its variants' LoRAs and the safety check.

    Raises:
        UnknownModelError: neither a known model nor a hub id; or the bundled one, which is here already.
    """
    if model == SAFETY_MODEL:
        return [SAFETY_PART]
    preset = models().get(model) or next((m for m in models().values() if m.hub == model), None)
    if preset is None:
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            known = ", ".join(m.name for m in models().values() if m.hub)
            raise UnknownModelError(f"{model!r} cannot be downloaded. Known models: {known}; or a hub id, owner/name.")
        return [Part(model, MODEL_PATTERNS, "model"), SAFETY_PART]
    if preset.hub is None:
        raise UnknownModelError(f"{preset.name} is bundled with the package; there is nothing to download.")
    loras = sorted({r.lora for r in preset.variants.values() if r.lora and ":" in r.lora})
    files = [Part(repo, (name,), "LoRA") for repo, _, name in (source.partition(":") for source in loras)]
    return [Part(preset.hub, MODEL_PATTERNS, "model"), *files, SAFETY_PART]


def download(part: Part) -> Path:
    """Fetch one part into the hub's cache, showing progress.

    Returns:
        The snapshot's folder.

    Raises:
        DownloadError: refused (a gated repository: where to accept the licence and how to log in), not found, or the line
            or the disk failed. What has arrived is kept.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        for name in large_files(part):
            fetch_large(part.repo, name)
        return Path(snapshot_download(part.repo, allow_patterns=list(part.patterns)))
    except GatedRepoError as error:
        raise DownloadError(
            f"{part.repo} is gated ({_status(error)}). Accept its licence at https://huggingface.co/{part.repo}, then log in "
            f"with `hf auth login` (or set HF_TOKEN) and run the command again."
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"The hub knows no {part.repo}, or it is private ({_status(error)}). Check the name; for a private repository log "
            f"in with `hf auth login`."
        ) from error
    except Exception as error:
        broken = isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError, OSError))
        if not broken and not type(error).__module__.startswith(HTTP_LIBRARIES):
            raise
        raise DownloadError(
            f"Downloading {part.repo} failed: {reason(error)}. What has arrived is kept; run the command again to go on."
        ) from error


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else "refused"


def large_files(part: Part) -> Iterator[str]:
    """Names of the wanted files above :data:`LARGE`, largest last."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    found = [f for f in HfApi().list_repo_tree(part.repo, recursive=True) if getattr(f, "size", 0) > LARGE]
    wanted = filter_repo_objects(found, allow_patterns=list(part.patterns), key=lambda f: f.path)
    yield from (f.path for f in sorted(wanted, key=lambda f: f.size))


def fetch_large(repo: str, name: str) -> None:
    """Fetch one file into the cache's blobs, going on from what an earlier try left; the hub's client links it later.

    Raises:
        OSError: the line broke, the disk is full, or what arrived is not what the hub describes.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

    url = hf_hub_url(repo, name)
    facts = get_hf_file_metadata(url)
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    blob, part = blobs / facts.etag, blobs / f"{facts.etag}.part"
    with WeakFileLock(blobs / f"{facts.etag}.part.lock"):
        if blob.exists():
            return
        digest, start = hash_of(part)
        headers = {"Range": f"bytes={start}-"} if start else {}
        if urlsplit(facts.location).netloc == urlsplit(url).netloc:
            headers |= build_hf_headers()
        if start < facts.size:
            with (
                urlopen(HttpRequest(facts.location, headers=headers), timeout=TIMEOUT) as answer,
                part.open("ab") as f,
                tqdm(total=facts.size, initial=start, unit="B", unit_scale=True, desc=name) as bar,
            ):
                if start and answer.status != 206:
                    f.truncate(0)
                    digest, start = hashlib.sha256(), 0
                    bar.reset()
                while chunk := answer.read(CHUNK):
                    f.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        check_arrival(part, facts, digest)
        part.replace(blob)


def hash_of(part: Path) -> tuple[Any, int]:
    """SHA-256 state and length of what an earlier try left."""
    digest, length = hashlib.sha256(), 0
    if part.exists():
        with part.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
                length += len(chunk)
    return digest, length


def check_arrival(part: Path, facts: Any, digest: Any) -> None:
    """Compare size and, where the hub's tag is one, SHA-256; what does not agree is thrown away.

    Raises:
        OSError: it broke off (kept), or is not what the hub describes (thrown away).
    """
    size = part.stat().st_size
    if size < facts.size:
        raise OSError(f"the connection ended after {size} of {facts.size} bytes")
    if size > facts.size or (len(facts.etag) == 64 and digest.hexdigest() != facts.etag):
        part.unlink()
        raise OSError(f"{part.name} arrived damaged and was thrown away")
