"""Downloads against a hub on loopback: what is fetched, refusals, breaking off and going on."""

import os
import subprocess
import sys

import pytest
from fake_hub import Hub, files_of

from flux2_local import UnknownModelError
from flux2_local.download import parts_of
from flux2_local.presets import models
from flux2_local.store import SAFETY_MODEL

SAFETY = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "model.safetensors": b"s" * 1000,
    "pytorch_model.bin": b"x",
}


def flux2_local(hub, cache, *arguments):
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache.parent),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "3",
        "HF_TOKEN": "",
    }
    code = "from flux2_local.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=240
    )


def test_a_model_comes_with_its_safety_check_and_is_then_found(tmp_path, klein_folder):
    files = files_of(klein_folder)
    extra = {
        "flux-2-klein-4b.safetensors": b"a second copy",
        "text_encoder/pytorch_model.bin": b"pickle",
        "teaser.png": b"x",
    }
    with Hub({"black-forest-labs/FLUX.2-klein-4B": {**files, **extra}, SAFETY_MODEL: SAFETY}) as hub:
        done = flux2_local(hub, tmp_path / "hub", "download", "klein-4b")
        assert done.returncode == 0, done.stderr
        assert not set(hub.fetched) & {*extra, "pytorch_model.bin"}
        assert {"model.safetensors", "transformer/config.json", "tokenizer/chat_template.jinja"} <= set(hub.fetched)
        before = len(hub.fetched)
        again = flux2_local(hub, tmp_path / "hub", "download", "klein-4b")
        assert again.returncode == 0 and len(hub.fetched) == before, "a second download fetches nothing"
        listed = flux2_local(hub, tmp_path / "hub", "models")
    row = next(line for line in listed.stdout.splitlines() if line.startswith("klein-4b "))
    assert "here" in row and "not here" not in row


def test_a_gated_model_says_where_to_accept_its_licence(tmp_path):
    name = "black-forest-labs/FLUX.2-dev"
    with Hub({name: {"model_index.json": b"{}", "vae/config.json": b"{}"}}, gated={name}) as hub:
        done = flux2_local(hub, tmp_path / "hub", "download", "dev")
    assert done.returncode == 3
    assert f"https://huggingface.co/{name}" in done.stderr and "hf auth login" in done.stderr and "403" in done.stderr


def test_an_unknown_repository_is_named(tmp_path):
    with Hub({}) as hub:
        done = flux2_local(hub, tmp_path / "hub", "download", "nobody/nothing")
    assert done.returncode == 3 and "nobody/nothing" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, klein_folder):
    files = {**files_of(klein_folder), "vae/diffusion_pytorch_model.safetensors": os.urandom(30_000_000)}
    repo = "someone/klein"
    with Hub({repo: files, SAFETY_MODEL: SAFETY}, budget=20_000_000) as hub:
        broken = flux2_local(hub, tmp_path / "hub", "download", repo)
        assert broken.returncode == 3 and "What has arrived is kept" in broken.stderr, broken.stderr
        hub.budget = float("inf")
        hub.ranges.clear()
        done = flux2_local(hub, tmp_path / "hub", "download", repo)
        assert done.returncode == 0, done.stderr
        assert any(start > 1_000_000 for _, start in hub.ranges), hub.ranges
    folder = next((tmp_path / "hub").glob("models--someone--klein/snapshots/*"))
    assert (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes() == files[
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_what_belongs_to_a_model():
    parts = parts_of("dev")
    assert [p.purpose for p in parts] == ["model", "LoRA", "safety check"]
    assert parts[1].repo == "fal/FLUX.2-dev-Turbo" and parts[1].patterns == ("flux.2-turbo-lora.safetensors",)
    assert parts_of(models()["klein-9b"].hub)[0].repo == models()["klein-9b"].hub


@pytest.mark.parametrize(("name", "words"), [("tiny", "bundled"), ("nonsense", "Known models")])
def test_what_cannot_be_downloaded(name, words):
    with pytest.raises(UnknownModelError, match=words):
        parts_of(name)
