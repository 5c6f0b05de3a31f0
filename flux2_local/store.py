"""Where models are: names, hub ids, folders and files -> :class:`Checkpoint`. Nothing here asks the network."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import weights
from .errors import UnknownModelError, WeightsDamagedError, WeightsMissingError
from .presets import BUNDLED, ModelPreset, families, models
from .request import Variant

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer")
PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")
SAFETY_MODEL = "Falconsai/nsfw_image_detection"


@dataclass(frozen=True)
class Checkpoint:
    """One model on this disk.

    Attributes:
        name: what to call it.
        source: what names it again as ``model``: a name, a hub id or an absolute path.
        preset: how it serves the variants.
        folder: its hub layout (with a single file: the folder that the other components come from).
        single: a transformer in one .safetensors or .gguf file that replaces the folder's, or None.
    """

    name: str
    source: str
    preset: ModelPreset
    folder: Path
    single: Path | None = None

    def config(self, component: str) -> dict[str, Any]:
        """The component's ``config.json``."""
        return weights.read_json(self.folder / component / "config.json")

    @property
    def bundled(self) -> bool:
        return self.folder == BUNDLED


def find(model: str | Path | None, variant: Variant, base: str | Path | None = None) -> Checkpoint:
    """The checkpoint that ``model`` names; nothing is downloaded.

    Args:
        model: a name of ``models.toml``, a hub id, a folder in the hub layout, or a .safetensors or .gguf file with a
            transformer. None is not accepted here (see :func:`candidates`).
        variant: what it has to serve.
        base: for a single file, the model that the other components come from; found by the file's shapes where None.

    Raises:
        UnknownModelError: no such model, or it does not serve the variant.
        WeightsMissingError: known, and not on this disk.
        WeightsDamagedError: there, and not usable.
        PickleRefusedError: a pickle file.
    """
    name = str(model)
    path = Path(name).expanduser()
    if name in models():
        checkpoint = _known(models()[name])
    elif path.is_file():
        checkpoint = _single(path, variant, base)
    elif path.is_dir():
        checkpoint = _folder(path, path.resolve().name, str(path.resolve()))
    else:
        weights.refuse_pickle(path)
        checkpoint = _hub(name)
    checkpoint.preset.recipe(variant)
    return checkpoint


def candidates(variant: Variant) -> Iterator[Checkpoint]:
    """Known models on this disk that serve ``variant``, best first; the bundled one is the last."""
    for preset in models().values():
        if variant not in preset.variants:
            continue
        try:
            checkpoint = _known(preset)
            if recipe_lora(checkpoint, variant) is not None or preset.variants[variant].lora is None:
                yield checkpoint
        except (WeightsMissingError, WeightsDamagedError):
            continue


def _known(preset: ModelPreset) -> Checkpoint:
    if preset.hub is None:
        return Checkpoint(preset.name, preset.name, preset, BUNDLED)
    folder = snapshot(preset.hub)
    if folder is None:
        raise WeightsMissingError(
            f"The weights of {preset.title} are not on this disk. `flux2-local download {preset.name}` fetches them"
            f"{' (its licence has to be accepted on the hub first)' if preset.gated else ''}; without --model, what is here is used."
        )
    check_layout(folder)
    return Checkpoint(preset.name, preset.name, preset, folder)


def _hub(name: str) -> Checkpoint:
    known = next((m for m in models().values() if m.hub == name), None)
    if known is not None:
        return _known(known)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = snapshot(name)
        if folder is not None:
            return _folder(folder, name, name)
        raise WeightsMissingError(
            f"{name} is neither a folder here nor a hub model on this disk. If it is on the hub, "
            f"`flux2-local download {name}` fetches it."
        )
    near = difflib.get_close_matches(name, models(), 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UnknownModelError(
        f"There is no model {name!r}.{hint} Known models: {', '.join(models())}; a hub id (owner/name), a folder in the hub "
        f"layout, or a .safetensors or .gguf file work too."
    )


def _folder(folder: Path, name: str, source: str) -> Checkpoint:
    check_layout(folder)
    return Checkpoint(name, source, preset_of(folder), folder)


def _single(path: Path, variant: Variant, base: str | Path | None) -> Checkpoint:
    weights.refuse_pickle(path)
    if path.suffix.lower() not in (".safetensors", ".gguf"):
        raise UnknownModelError(f"{path.name} is neither a .safetensors nor a .gguf file, the two kinds that are read.")
    if base is not None:
        owner = find(base, variant)
    else:
        family = family_of_file(path)
        for preset in (m for m in models().values() if m.family == family):
            try:
                owner = _known(preset)
                break
            except WeightsMissingError:
                continue
        else:
            raise WeightsMissingError(
                f"{path.name} holds only a transformer{f' of the {family} family' if family else ''}. Its text encoder and "
                f"autoencoder come from a model in the hub layout, and none that fits is on this disk. Name one with --base, or "
                f"fetch one with `flux2-local download {family or 'NAME'}`."
            )
    return replace(owner, name=path.stem, source=str(path.resolve()), single=path)


def check_layout(folder: Path) -> None:
    """Make sure that ``folder`` is a FLUX.2 pipeline in the hub layout.

    Raises:
        WeightsDamagedError: something is missing, or it is another kind of pipeline.
    """
    index = folder / "model_index.json"
    if not index.exists():
        inside = folder.name in COMPONENTS or (folder / "config.json").exists()
        hint = f" {folder.parent} may be the folder you want." if inside else ""
        raise WeightsDamagedError(
            f"{folder} is not a model in the hub layout: it has no model_index.json (beside it belong "
            f"{', '.join(COMPONENTS)}).{hint}"
        )
    kind = weights.read_json(index).get("_class_name")
    if kind not in PIPELINES:
        raise WeightsDamagedError(f"{folder} holds a {kind}, and only {', '.join(PIPELINES)} are FLUX.2 models.")
    missing = [part for part in COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise WeightsDamagedError(f"{folder} lacks {', '.join(missing)}. {weights.FETCH_AGAIN}")


def preset_of(folder: Path) -> ModelPreset:
    """How a folder serves the variants: as its family's preset does, or, for other shapes, as its pipeline's does."""
    index = weights.read_json(folder / "model_index.json")
    config = weights.read_json(folder / "transformer" / "config.json")
    if index["_class_name"] == PIPELINES[2]:  # which never guides
        guidance = "none"
    else:
        guidance = "embedded" if config.get("guidance_embeds", True) else "none" if index.get("is_distilled") else "cfg"
    same_kind = [m for m in models().values() if m.pipeline == index["_class_name"] and m.guidance == guidance]
    for preset in same_kind:
        if _fits(config, _transformer_shape(preset)):
            return preset
    general = next(
        (m for m in same_kind if m.hub), models()["dev" if index["_class_name"] == PIPELINES[0] else "klein-4b"]
    )
    plain = {k: v for k, v in general.variants.items() if v.lora is None}
    return replace(general, name="custom", title="a model of your own", family="custom", hub=None, variants=plain)


def _transformer_shape(preset: ModelPreset) -> dict[str, Any]:
    if preset.family in families():
        return families()[preset.family]["transformer"]
    return weights.read_json(BUNDLED / "transformer" / "config.json") if (BUNDLED / "transformer").is_dir() else {}


def _fits(config: dict[str, Any], shape: dict[str, Any]) -> bool:
    names = ("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim")
    return bool(shape) and all(config.get(name) == shape.get(name) for name in names)


def family_of_file(path: Path) -> str | None:
    """The family that a single file's transformer belongs to, by its prompt projection's shape; None where none fits."""
    names = ("txt_in.weight", "model.diffusion_model.txt_in.weight", "context_embedder.weight")
    if path.suffix.lower() == ".gguf":
        import gguf

        try:
            found = [
                tuple(reversed([int(n) for n in t.shape])) for t in gguf.GGUFReader(path).tensors if t.name in names
            ]
        except Exception as error:
            raise WeightsDamagedError(f"{path} is not a readable GGUF file: {error}. {weights.FETCH_AGAIN}") from error
    else:
        entries = weights.header(path)
        found = [tuple(entries[name]["shape"]) for name in names if name in entries]
    for family, shapes in families().items():
        t = shapes["transformer"]
        if (t["num_attention_heads"] * 128, t["joint_attention_dim"]) in found:
            return family
    return None


def recipe_lora(checkpoint: Checkpoint, variant: Variant) -> Path | None:
    """The file of the LoRA that the variant's recipe names, or None if it names none or it is not on this disk."""
    source = checkpoint.preset.recipe(variant).lora
    if source is None:
        return None
    if ":" not in source:
        path = checkpoint.folder / source
        return path if path.exists() else None
    repo, _, name = source.partition(":")
    return cached_file(repo, name)


def require_lora(checkpoint: Checkpoint, variant: Variant) -> Path | None:
    """Like :func:`recipe_lora`, but a LoRA that is named and missing is an error.

    Raises:
        WeightsMissingError: it is not on this disk.
    """
    path = recipe_lora(checkpoint, variant)
    source = checkpoint.preset.recipe(variant).lora
    if path is None and source is not None:
        raise WeightsMissingError(
            f"The {variant} variant of {checkpoint.preset.title} needs the LoRA {source}, which is not on this disk. "
            f"`flux2-local download {checkpoint.preset.name}` fetches it."
        )
    return path


# ---- the hub's cache ----


def snapshot(repo: str) -> Path | None:
    """Folder of a hub model in the hub's cache, or None. Asks nobody."""
    index = cached_file(repo, "model_index.json")
    return None if index is None else index.parent


def cached_file(repo: str, name: str) -> Path | None:
    """Path of one file in the hub's cache, or None. Asks nobody."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
