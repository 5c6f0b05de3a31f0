"""The safety check: a real ViT in the classifier's layout, and what happens without one."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import ViTConfig, ViTForImageClassification

from flux2_local import Flux2, SafetyUnavailableError, safety
from flux2_local.store import SAFETY_MODEL

FIELDS = {"image_size": "square", "num_inference_steps": 4, "seed": 3}


def save_classifier(folder, bias):
    """A small random ViT whose last bias decides: +20 flags everything, -20 nothing."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, bias]))
    model.save_pretrained(folder)
    facts = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))


@pytest.fixture
def in_cache(tmp_path, monkeypatch):
    """Puts a classifier with the given bias where a download would."""

    def put(bias):
        root = tmp_path / "hub" / f"models--{SAFETY_MODEL.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("abc")
        save_classifier(root / "snapshots" / "abc", bias)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return put


def test_flagged_pictures_come_back_black(in_cache, dev_folder):
    in_cache(20.0)
    result = Flux2.load(dev_folder).generate("a boat", num_images=2, **FIELDS)
    assert result.has_nsfw_concepts == (True, True)
    assert all(not np.asarray(image.image).any() for image in result.images)
    assert result.timings.safety > 0


def test_harmless_pictures_pass(in_cache, dev_folder):
    in_cache(-20.0)
    checked = Flux2.load(dev_folder).generate("a boat", **FIELDS)
    plain = Flux2.load(dev_folder).generate("a boat", enable_safety_checker=False, **FIELDS)
    assert checked.has_nsfw_concepts == (False,)
    assert np.array_equal(np.asarray(checked.images[0].image), np.asarray(plain.images[0].image))


def test_the_threshold_is_the_makers(in_cache):
    in_cache(0.0)
    folder = safety.classifier_folder()
    model = ViTForImageClassification.from_pretrained(folder)
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for probability, flagged in ((0.86, True), (0.84, False)):
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor([0.0, float(np.log(probability / (1 - probability)))]))
        model.save_pretrained(folder)
        assert safety.make_checker()(picture) is flagged


def test_without_a_classifier_nothing_is_generated(dev_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    flux = Flux2.load(dev_folder)
    steps = []
    with pytest.raises(SafetyUnavailableError, match=r"download.*pip install.*enable_safety_checker=False"):
        flux.generate("a boat", progress=steps.append, **FIELDS)
    assert steps == []


def test_nudenet_serves_where_it_is_installed(dev_folder, monkeypatch):
    class NudeDetector:
        def detect(self, pixels):
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
            return [{"class": "BUTTOCKS_EXPOSED", "score": 0.9}, {"class": "FACE_FEMALE", "score": 0.99}]

    module = types.ModuleType("nudenet")
    module.NudeDetector = NudeDetector
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "nudenet", module)
    assert safety.available() == "nudenet"
    assert Flux2.load(dev_folder).generate("a boat", **FIELDS).has_nsfw_concepts == (True,)


def test_nudenet_itself_sees_nothing_wrong_in_noise():
    pytest.importorskip("nudenet")
    from PIL import Image

    assert safety.nudenet_checker()(Image.effect_noise((256, 256), 50).convert("RGB")) is False
