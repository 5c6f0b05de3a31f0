"""The script that writes models of random weights: what lies in the folder runs, and both namings are one model."""

import numpy as np
import pytest
from components import TRANSFORMER, VAE, language_numbers

from flux2_local import Flux2
from scripts import random_model

TEXT = {**language_numbers(28, 300), "model_type": "qwen3", "rope_theta": 1e6}
SMALL = {
    "klein-4b": {
        "transformer": {**TRANSFORMER, "joint_attention_dim": 48, "guidance_embeds": False},
        "text_encoder": TEXT,
        "vae": VAE,
    }
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
