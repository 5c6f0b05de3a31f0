"""The script that writes models of random weights: what lies in the folder runs, and both namings are one model."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from components import TRANSFORMER, VAE, language_numbers
from diffusers import Flux2Pipeline

from flux2_local import Flux2
from scripts import random_model
from scripts.train_tiny.language import SIGHT

TEXT = {**language_numbers(28, 300), "model_type": "qwen3", "rope_theta": 1e6}
SMALL = {
    "klein-4b": {
        "transformer": {**TRANSFORMER, "joint_attention_dim": 48, "guidance_embeds": False},
        "text_encoder": TEXT,
        "vae": VAE,
    },
    "dev": {
        "transformer": {**TRANSFORMER, "joint_attention_dim": 48},
        "text_encoder": {**language_numbers(32, 1024), "model_type": "mistral", "rope_theta": 1e9},
        "vae": VAE,
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(random_model, "families", lambda: SMALL)
    random_model.write("klein-4b", tmp_path / "klein-4b", seed=0)
    return tmp_path / "klein-4b"


def picture(flux):
    result = flux.generate("a boat", seed=1, image_size={"width": 512, "height": 512}, enable_safety_checker=False)
    return np.asarray(result.images[0].image)


def test_the_folder_runs_and_the_makers_file_is_the_same_model(folder):
    first = picture(Flux2.load(folder, acceleration="none"))
    assert first.std() > 1
    file = folder / random_model.PUBLISHED
    assert np.array_equal(first, picture(Flux2.load(file, base=folder, acceleration="none")))


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["random_model.py", "klein-4b", str(tmp_path)])
    with pytest.raises(SystemExit):
        random_model.main()
    assert "is there already" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """dev's folder, small, in shards of 100 KB."""
    monkeypatch.setattr(random_model, "families", lambda: SMALL)
    monkeypatch.setattr(random_model, "SHARD", 100_000)
    config = partial(random_model.Mistral3Config, vision_config=SIGHT)
    monkeypatch.setattr(random_model, "Mistral3Config", config)
    random_model.write("dev", tmp_path / "dev", seed=0)
    return tmp_path / "dev"


def test_devs_shards_run_in_diffusers_too(dev):
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        files = sorted((dev / part).glob("*.safetensors"))
        assert len(files) > 1 and files[0].name == f"{stem}-00001-of-{len(files):05}.safetensors"
        assert max(file.stat().st_size for file in files) < 150_000
        index = json.loads((dev / part / f"{stem}.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
    assert not (dev / random_model.PUBLISHED).exists()
    mine = picture(Flux2.load(dev, acceleration="none"))
    pipe = Flux2Pipeline.from_pretrained(dev, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    stock = pipe(prompt="a boat", width=512, height=512, num_inference_steps=4, generator=generator).images[0]
    assert mine.std() > 1 and np.asarray(stock).shape == mine.shape


def test_the_size_is_said_and_a_disk_too_small_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_model.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**11))
    monkeypatch.setattr("sys.argv", ["random_model.py", "dev", str(tmp_path / "models" / "dev")])
    with pytest.raises(SystemExit):
        random_model.main()
    said = capsys.readouterr()
    assert said.out.startswith("dev: 105 GiB to be written") and "93.1 GiB left" in said.err
    assert not list(tmp_path.iterdir())
