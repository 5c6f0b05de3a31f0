"""``flux2-local serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BackendUnavailableError
from . import options

DEFAULT_PORT = 8484
KEY_VARIABLE = "FLUX2_LOCAL_KEY"
EXPECTED = 1000
"""Requests that a server is taken to answer, by which its plans weigh whether compiling pays."""


def default_folder() -> Path:
    """Where the queue and its pictures are kept, unless the user says otherwise."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "flux2-local"


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Serve other machines too; needs --host and --api-key.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar=KEY_VARIABLE, help="Key that callers must present as fal's.", show_envvar=True
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Serve https too, with an authority made for this machine alone.")
    ] = False,
    tls_port: Annotated[int | None, typer.Option("--tls-port", min=0, max=65535, help="Default: --port + 1.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="The queue and its pictures (default: the user's data folder).")
    ] = None,
    keep: Annotated[str, typer.Option("--keep", help="How long pictures are kept: 7d, 12h, 30m or forever.")] = "7d",
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait.")] = 100,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Let image_urls and webhooks point into private networks.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Web origin that may call; may be repeated."),
    ] = None,
    no_safety_checker: Annotated[
        bool, typer.Option("--no-safety-checker", help="Skip the safety check, whatever a request says.")
    ] = False,
    variant_models: Annotated[
        str | None, typer.Option("--variant-models", help="Other models for variants: standard=dev,turbo=klein-4b.")
    ] = None,
    model: options.Model = None,
    acceleration: options.AccelerationOption = None,
    lora: options.LoraOption = None,
    vram: options.Vram = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    quantize: options.Quantize = None,
    compiled: options.Compile = None,
    keep_prompts: options.KeepPrompts = None,
    base: options.Base = None,
) -> None:
    try:
        from ..server.run import serve as run
        from ..server.settings import Settings, parse_duration, parse_models
    except ImportError as error:
        raise BackendUnavailableError(
            f"The server needs packages that are not installed ({error.name}): pip install 'flux2-local[server]'."
        ) from error
    loading: dict[str, Any] = {
        "model": model, "acceleration": acceleration, "lora": options.parse_loras(lora) or None, "vram": vram,
        "device": device, "dtype": dtype, "attention": attention, "quantize": quantize, "compile": compiled,
        "keep_prompts": keep_prompts, "base": base, "requests": EXPECTED,
    }  # fmt: skip
    secure = (0 if port == 0 else port + 1) if tls_port is None else tls_port
    settings = Settings(
        folder=(folder or default_folder()).expanduser().absolute(),
        host=host,
        port=port,
        tls_port=secure if tls or tls_port is not None else None,
        key=api_key or None,
        remote=allow_remote,
        loading={k: v for k, v in loading.items() if v is not None},
        models=parse_models(variant_models),
        keep=parse_duration(keep),
        queue_limit=max_queue,
        private_urls=allow_private_urls,
        origins=tuple(allow_origin or ()),
        safety_checker=not no_safety_checker,
    )
    run(settings)
