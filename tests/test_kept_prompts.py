"""Prompts' embeddings on disk: the text encoder is not read for a prompt that is there, and pictures are the same."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flux2_local import Flux2
from flux2_local.cli import app
from flux2_local.endpoints import Pipelines
from flux2_local.quant import builtin
from flux2_local.text import kept
from flux2_local.text.kept import KeptPrompts

FIELDS = {"image_size": "square", "seed": 3, "num_inference_steps": 4, "enable_safety_checker": False}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "prompts")
    return tmp_path / "prompts"


def draw(flux, prompt="a red boat"):
    result = flux.generate(prompt, **FIELDS)
    return np.asarray(result.images[0].image), result.notes


def read(flux):
    """Whether the text encoder's weights were asked for."""
    return not next(flux._components.text_encoder.encoder.parameters()).is_meta


def test_a_known_prompt_needs_no_text_encoder(klein_base_folder, cache):
    wanted, _ = draw(Flux2.load(klein_base_folder))
    assert not cache.exists(), "it is off unless it is asked for"
    first = Flux2.load(klein_base_folder, keep_prompts=True)
    assert not read(first)
    assert np.array_equal(draw(first)[0], wanted) and read(first)
    assert len(list(cache.iterdir())) == 2  # the prompt and the empty prompt
    second = Flux2.load(klein_base_folder, keep_prompts=True)
    assert np.array_equal(draw(second)[0], wanted) and not read(second)
    assert not np.array_equal(draw(second, "a green house")[0], wanted) and read(second)
    assert len(list(cache.iterdir())) == 3


def test_a_text_encoder_whose_reading_was_broken_off_is_read_again(klein_folder, tmp_path, monkeypatch):
    wanted, _ = draw(Flux2.load(klein_folder, quantize="builtin-int8"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing is quantized yet
    flux = Flux2.load(klein_folder, quantize="builtin-int8", keep_prompts=True)
    done, quantize = [], builtin.quantize

    def stopped(*given):
        done.append(given)
        if len(done) == 3:
            raise KeyboardInterrupt
        return quantize(*given)

    monkeypatch.setattr(builtin, "quantize", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(flux)
    assert np.array_equal(draw(flux)[0], wanted)


def test_many_requests_use_it_too(dev_folder, cache):
    asked = [{"prompt": f"boat {number}", **FIELDS} for number in range(2)]
    pictures = []
    for _ in range(2):
        flux = Flux2.load(dev_folder, keep_prompts=True)
        pictures.append([result.images[0].data for result in flux.generate_many(asked)])
    assert pictures[0] == pictures[1] and not read(flux)


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_commands_keep_them_where_that_is_asked_for(klein_folder, cache, tmp_path, command):
    (tmp_path / "p.txt").write_text("a red boat\n")
    what = (
        ["a red boat", "-o", tmp_path / "x.png"]
        if command == "generate"
        else [tmp_path / "p.txt", "-o", tmp_path / "out"]
    )
    common = ["--overwrite"] if command == "batch" else []
    arguments = [
        command,
        *what,
        *common,
        "-m",
        klein_folder,
        "--size",
        "512x512",
        "--steps",
        "4",
        "--no-safety-checker",
    ]
    for option, kept_then in ([], 0), (["--keep-prompts"], 1):
        done = CliRunner().invoke(app, [str(part) for part in (*arguments, *option)])
        assert done.exit_code == 0, done.output
        assert len(list(cache.glob("*"))) == kept_then


def test_the_server_keeps_them_where_that_is_asked_for(klein_folder, cache, tmp_path, monkeypatch):
    run = pytest.importorskip("flux2_local.server.run", reason="the server's packages are not installed")
    asked = []
    monkeypatch.setattr(run, "serve", asked.append)
    done = CliRunner().invoke(app, ["serve", "-m", str(klein_folder), "--folder", str(tmp_path), "--keep-prompts"])
    assert done.exit_code == 0, done.output
    flux = Pipelines(asked[0].loading).get("standard")
    assert not read(flux)
    draw(flux)
    assert len(list(cache.iterdir())) == 1


def test_another_encoder_format_or_type_has_embeddings_of_its_own(dev_folder, klein_folder, cache):
    paths = set()
    for folder, options in (
        (dev_folder, {"dtype": "float32"}),
        (klein_folder, {"dtype": "float32"}),
        (dev_folder, {"dtype": "float32", "quantize": "builtin-int8"}),
        (dev_folder, {"dtype": "bfloat16"}),
    ):
        flux = Flux2.load(folder, keep_prompts=True, **options)
        paths.add(flux._components.text_encoder.kept.path(*tokens(0)))
    assert len(paths) == 4


def test_nobody_can_read_a_prompt_there(dev_folder, cache):
    draw(Flux2.load(dev_folder, keep_prompts=True), "a very private boat")
    files = list(cache.iterdir())
    assert cache.stat().st_mode & 0o077 == 0
    for path in files:
        assert "boat" not in path.name and b"boat" not in path.read_bytes()


def test_a_damaged_file_is_made_again(dev_folder, cache):
    wanted, _ = draw(Flux2.load(dev_folder, keep_prompts=True))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    flux = Flux2.load(dev_folder, keep_prompts=True)
    picture, notes = draw(flux)
    assert np.array_equal(picture, wanted) and sum("made again" in note for note in notes) == 1
    assert path.read_bytes() == whole and not any("made again" in note for note in draw(flux)[1])


def tokens(number):
    return torch.full((1, 8), number), torch.ones(1, 8, dtype=torch.long)


@pytest.mark.parametrize("harm", [lambda b: b[:-8], lambda b: b"", lambda b: b[:-1] + b"\1", lambda b: b"{" + b[1:]])
def test_what_is_not_whole_is_not_read(cache, harm):
    store = KeptPrompts("encoder", torch.float32)
    store.write(*tokens(0), torch.zeros(1, 8, 4))
    path = store.path(*tokens(0))
    path.write_bytes(harm(path.read_bytes()))
    assert store.read(*tokens(0)) is None and len(store.told) == 1


def test_what_was_unused_for_longest_goes(cache):
    value = torch.arange(1 * 8 * 128.0).reshape(1, 8, 128)
    store = KeptPrompts("encoder", torch.float32, room=3 * 4700)
    for number in range(3):
        store.write(*tokens(number), value + number)
        os.utime(store.path(*tokens(number)), (number, number))
    assert torch.equal(store.read(*tokens(0)), value)
    store.write(*tokens(3), value)
    assert [store.read(*tokens(number)) is not None for number in range(4)] == [True, False, True, True]
    assert replace(store, encoder="another").read(*tokens(0)) is None and not store.told


def test_a_folder_that_cannot_be_written_is_told_and_nothing_fails(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr(kept, "folder", lambda: blocked / "prompts")
    store = KeptPrompts("encoder", torch.float32)
    store.write(*tokens(0), torch.zeros(1, 8, 4))
    assert "was not kept" in store.told[0] and store.read(*tokens(0)) is None
