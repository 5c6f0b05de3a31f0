"""The safety check: a picture classifier, and where its weights come from.

``Falconsai/nsfw_image_detection`` (a ViT, Apache-2.0) at the threshold that Black Forest Labs' own code uses, when its
weights are on the disk; else NudeNet, whose weights are inside its package (extra ``[safety]``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SafetyUnavailableError
from .store import SAFETY_MODEL, cached_file

if TYPE_CHECKING:
    from PIL import Image

Checker = Callable[["Image.Image"], bool]
"""Picture -> whether it is flagged."""

THRESHOLD = 0.85
"""Probability of "nsfw" from which a picture is flagged. Source: ``flux2/src/flux2/text_encoder.py`` of BFL."""

NUDENET_SCORE = 0.6
NUDENET_CLASSES = frozenset(
    {
        "FEMALE_BREAST_EXPOSED",
        "FEMALE_GENITALIA_EXPOSED",
        "MALE_GENITALIA_EXPOSED",
        "BUTTOCKS_EXPOSED",
        "ANUS_EXPOSED",
    }
)


def available() -> str | None:
    """The classifier that would be used, or None."""
    if classifier_folder() is not None:
        return SAFETY_MODEL
    from importlib.util import find_spec

    return "nudenet" if find_spec("nudenet") is not None else None


def classifier_folder() -> Path | None:
    """Folder of the ViT's files in the hub's cache, or None."""
    path = cached_file(SAFETY_MODEL, "model.safetensors")
    return path.parent if path is not None and (path.parent / "config.json").exists() else None


def make_checker() -> Checker:
    """Load the classifier.

    Raises:
        SafetyUnavailableError: there is none on this machine; the message names both ways to get one.
    """
    folder = classifier_folder()
    if folder is not None:
        return vit_checker(folder)
    if available() == "nudenet":
        return nudenet_checker()
    raise SafetyUnavailableError(
        "The safety check is on (enable_safety_checker, the default) and there is no classifier on this machine. Either "
        f"fetch one with `flux2-local download {SAFETY_MODEL}`, or `pip install 'flux2-local[safety]'`, which brings one "
        "inside its package for machines that stay offline. To go without, say enable_safety_checker=False (--no-safety-checker)."
    )


def vit_checker(folder: Path) -> Checker:
    """The ViT of ``Falconsai/nsfw_image_detection``, on the CPU."""
    import json

    import torch
    from PIL import Image
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    facts: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    size = facts["size"]["height"] if isinstance(facts["size"], dict) else facts["size"]
    mean = torch.tensor(facts["image_mean"]).view(1, 3, 1, 1)
    std = torch.tensor(facts["image_std"]).view(1, 3, 1, 1)
    bad = [int(i) for i, label in model.config.id2label.items() if label.lower() == "nsfw"]

    @torch.inference_mode()
    def check(image: Image.Image) -> bool:
        from .images import to_pixels

        small = image.resize((size, size), Image.Resampling(facts.get("resample", 2)))
        pixels = (to_pixels(small) * 0.5 + 0.5 - mean) / std
        scores = model(pixel_values=pixels).logits.softmax(-1)[0]
        return bool(scores[bad].sum() >= THRESHOLD)

    return check


def nudenet_checker() -> Checker:
    """NudeNet's detector (ONNX, on the CPU)."""
    import numpy as np
    from nudenet import NudeDetector

    detector = NudeDetector()

    def check(image: Image.Image) -> bool:
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        return any(d["class"] in NUDENET_CLASSES and d["score"] >= NUDENET_SCORE for d in detector.detect(pixels))

    return check
