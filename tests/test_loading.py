"""Weights in every form: folder, single file in two naming schemes, GGUF; and everything that can be wrong with them."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from components import TRANSFORMER
from safetensors.torch import load_file, save_file

from flux2_local import (
    Flux2,
    PickleRefusedError,
    RequestError,
    UnknownModelError,
    WeightsDamagedError,
    WeightsMissingError,
    mapping,
    single,
    store,
)
from flux2_local.presets import models
from scripts.random_model import as_published

FIELDS = {"image_size": "square", "num_inference_steps": 4, "seed": 3, "enable_safety_checker": False}


def pixels(flux):
    return np.asarray(flux.generate("a red boat", **FIELDS).images[0].image).astype(int)


def same(a, b):
    """Equal but for rounding: matmuls round by how weights lie in memory, and that differs between layouts of a file."""
    return np.abs(a - b).max() <= 1 and (a != b).mean() < 1e-3


@pytest.fixture(scope="module")
def reference(dev_folder):
    return pixels(Flux2.load(dev_folder, acceleration="none"))


def bfl_names(state):
    """The transformer's tensors under Black Forest Labs' own names."""
    return {
        k: v.contiguous() for k, v in as_published(state, TRANSFORMER["num_layers"], TRANSFORMER["num_single_layers"])
    }


@pytest.fixture(scope="module")
def state(dev_folder):
    return load_file(dev_folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("naming", ["hub", "bfl", "comfy"])
def test_a_single_file_gives_the_same_pixels(tmp_path, dev_folder, state, reference, naming):
    path = tmp_path / "model.safetensors"
    tensors = state if naming == "hub" else bfl_names(state)
    if naming == "comfy":
        tensors = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    save_file(tensors, path)
    flux = Flux2.load(path, base=dev_folder, acceleration="none")
    assert flux.checkpoint.single == path and flux.checkpoint.name == "model"
    assert same(pixels(flux), reference)


def write_gguf(path, tensors, kind):
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in tensors.items():
        array = value.float().numpy()
        fits = array.ndim == 2 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        how = kind if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0.05), ("BF16", 12.0), ("Q8_0", 12.0)])
def test_gguf_gives_the_pixels_of_its_precision(tmp_path, dev_folder, state, reference, kind, bound):
    path = tmp_path / "model.gguf"
    write_gguf(path, bfl_names(state), gguf.GGMLQuantizationType[kind])
    got = pixels(Flux2.load(path, base=dev_folder, acceleration="none"))
    error = np.sqrt(((got - reference) ** 2).mean())
    assert error <= bound and same(got, reference) == (kind == "F32")


def test_gguf_dequantises_as_diffusers_does(tmp_path, state):
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    path = tmp_path / "model.gguf"
    write_gguf(path, bfl_names(state), gguf.GGMLQuantizationType.Q8_0)
    theirs, ours = load_gguf_checkpoint(path), dict(single.read_gguf(path))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        want = dequantize_gguf_tensor(value) if hasattr(value, "quant_type") else value
        got = mapping.made(ours[name], torch.float32)
        torch.testing.assert_close(got, want.float().reshape(got.shape), rtol=1e-3, atol=1e-5)


def copied(folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    return target


def cut(path, count=1000):
    path.write_bytes(path.read_bytes()[:-count])


def without(folder, name):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if k != name}
    save_file(kept, file)


def other_width(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 4}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: cut(f / "transformer" / "diffusion_pytorch_model.safetensors"),
            r"diffusion_pytorch_model.*damaged.*download",
        ),
        (lambda f: cut(f / "vae" / "diffusion_pytorch_model.safetensors"), "vae.*damaged"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"x" * 100), "not a readable safetensors"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b""), "not a readable safetensors"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no .safetensors file"),
        (lambda f: without(f, "proj_out.weight"), "lacks 1 tensors .proj_out.weight"),
        (other_width, "shape"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "transformer" / "config.json").write_text("[1]"), "JSON object"),
        (lambda f: shutil.rmtree(f / "vae"), "lacks vae"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "FluxPipeline"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("nonsense"), "tokenizer"),
        (lambda f: (f / "text_encoder" / "config.json").write_text('{"model_type": "t5"}'), "t5"),
    ],
)
def test_damaged_weights_are_named(tmp_path, dev_folder, damage, words):
    folder = copied(dev_folder, tmp_path)
    damage(folder)
    with pytest.raises(WeightsDamagedError, match=words):
        Flux2.load(folder)


def test_sharded_folders_load_and_missing_shards_are_named(tmp_path, dev_folder, state, reference):
    folder = copied(dev_folder, tmp_path)
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    index = {}
    for i, half in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in half}, part / file)
        index |= dict.fromkeys(half, file)
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(pixels(Flux2.load(folder, acceleration="none")), reference)
    (part / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsDamagedError, match="00002-of-00002"):
        Flux2.load(folder)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "weights.pt", "x.PTH"])
def test_pickles_are_refused_there_or_not(tmp_path, name):
    with pytest.raises(PickleRefusedError, match="pickle"):
        Flux2.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(PickleRefusedError, match="pickle"):
        Flux2.load(tmp_path / name)


def test_a_folder_with_only_pickles_is_refused(tmp_path, dev_folder):
    folder = copied(dev_folder, tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(PickleRefusedError):
        Flux2.load(folder)


def test_damaged_gguf_is_named(tmp_path, dev_folder):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 20)
    for base in (None, dev_folder):
        with pytest.raises(WeightsDamagedError, match="GGUF"):
            Flux2.load(path, base=base)


def test_a_single_file_without_its_companions_says_which(tmp_path):
    path = tmp_path / "flux2.safetensors"
    save_file({"txt_in.weight": torch.zeros(6144, 15360, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(WeightsMissingError, match="dev family.*flux2-local download dev"):
        Flux2.load(path)


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("klien-4b", UnknownModelError, "Did you mean klein-4b"),
        ("dev", WeightsMissingError, "download dev.*licence"),
        ("klein-4b", WeightsMissingError, "download klein-4b"),
        ("black-forest-labs/FLUX.2-dev", WeightsMissingError, "download dev"),
        ("someone/flux", WeightsMissingError, "someone/flux"),
    ],
)
def test_models_that_are_not_here(model, kind, words):
    with pytest.raises(kind, match=words):
        Flux2.load(model)


def test_a_text_file_is_no_model(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(UnknownModelError, match="neither"):
        Flux2.load(path)


def test_a_component_folder_hints_at_its_parent(dev_folder):
    with pytest.raises(WeightsDamagedError, match=f"{dev_folder} may be the folder"):
        Flux2.load(dev_folder / "vae")


def test_custom_models_serve_what_they_can(dev_folder, klein_folder, klein_base_folder):
    assert list(store.find(dev_folder, "standard").preset.variants) == ["standard"]
    assert list(store.find(klein_folder, "flash").preset.variants) == ["standard", "turbo", "flash"]
    assert store.find(klein_base_folder, "standard").preset.guidance == "cfg"
    with pytest.raises(UnknownModelError, match="does not serve the turbo variant"):
        store.find(dev_folder, "turbo")
    with pytest.raises(UnknownModelError, match="does not serve the flash variant"):
        store.find(klein_base_folder, "flash")


def test_families_are_recognised_by_their_shapes(tmp_path, dev_folder):
    folder = copied(dev_folder, tmp_path)
    file = folder / "transformer" / "config.json"
    shape = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}
    file.write_text(json.dumps({**json.loads(file.read_text()), **shape}))
    assert store.preset_of(folder) == models()["dev"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "ultra"}, "standard, turbo, flash"),
        ({"acceleration": "max"}, "none, regular, high"),
        ({"dtype": "int3"}, "float32, bfloat16, float16"),
        ({"vram": "lots"}, "12GiB"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, words):
    with pytest.raises(RequestError, match=words):
        Flux2.load("tiny", **arguments)
