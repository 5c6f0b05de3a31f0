"""LoRA files in the layouts that are about, against diffusers' own loading of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import save_file

from flux2_local import Flux2, WeightsDamagedError, load, lora
from flux2_local.lora import Lora
from flux2_local.model.meta import meta
from flux2_local.model.transformer import Flux2Transformer

FIELDS = {"image_size": "square", "num_inference_steps": 4, "seed": 3, "enable_safety_checker": False}
RANK = 4
TARGETS = {  # hub name: (in, out), its name in BFL's layout
    "transformer_blocks.0.attn.to_out.0": (48, 48, "double_blocks.0.img_attn.proj"),
    "transformer_blocks.1.ff.linear_in": (48, 288, "double_blocks.1.img_mlp.0"),
    "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (48, 432, "single_blocks.2.linear1"),
    "single_transformer_blocks.0.attn.to_out": (192, 48, "single_blocks.0.linear2"),
}


def low_rank():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, fan_in, generator=generator) / fan_in**0.5,
            torch.randn(fan_out, RANK, generator=generator) / RANK**0.5,
        )
        for name, (fan_in, fan_out, _) in TARGETS.items()
    }


def metadata(alpha, **more):
    facts = {"r": RANK, "lora_alpha": alpha, "target_modules": sorted(TARGETS), **more}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in facts.items()})}


def as_diffusers(alpha=None, **more):
    state = {}
    for name, (down, up) in low_rank().items():
        state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return state, metadata(alpha, **more) if alpha else {"format": "pt"}


def as_ai_toolkit(alpha=None):
    state = {}
    for name, (down, up) in low_rank().items():
        other = TARGETS[name][2]
        state |= {f"diffusion_model.{other}.lora_A.weight": down, f"diffusion_model.{other}.lora_B.weight": up}
    return state, metadata(alpha) if alpha else {"format": "pt"}


def as_kohya():
    state = {}
    for name, (down, up) in low_rank().items():
        other = "lora_unet_" + TARGETS[name][2].replace(".", "_")
        state |= {f"{other}.lora_down.weight": down, f"{other}.lora_up.weight": up, f"{other}.alpha": torch.tensor(2.0)}
    return state, {"format": "pt"}


LAYOUTS = {
    "diffusers": as_diffusers,
    "diffusers, alpha 8": lambda: as_diffusers(8),
    "diffusers, alpha 8, rank-stabilized": lambda: as_diffusers(8, use_rslora=True),
    "diffusers, alpha 8, patterns": lambda: as_diffusers(
        8, alpha_pattern={"attn.to_(out|qkv.*)": 16, "ff.linear_in": 1}
    ),
    "ai-toolkit": as_ai_toolkit,
    "ai-toolkit, alpha 8": lambda: as_ai_toolkit(8),
    "kohya": as_kohya,
}


def pixels(flux):
    return np.asarray(flux.generate("a red boat", **FIELDS).images[0].image).astype(int)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_lora_changes_the_picture_as_in_diffusers(tmp_path, dev_folder, layout, strength):
    state, facts = LAYOUTS[layout]()
    path = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path, facts)
    pipe = Flux2Pipeline.from_pretrained(dev_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="a")
    pipe.set_adapters(["a"], [strength])
    generator = torch.Generator().manual_seed(3)
    (want,) = pipe(
        prompt="a red boat",
        width=512,
        height=512,
        num_inference_steps=4,
        guidance_scale=2.5,
        generator=generator,
    ).images
    got = pixels(Flux2.load(dev_folder, acceleration="none", lora=(path, strength)))
    plain = pixels(Flux2.load(dev_folder, acceleration="none"))
    error = np.abs(np.asarray(want).astype(int) - got)
    # Merged and unmerged round differently; the change itself is two orders larger.
    assert error.max() <= 2 and error.mean() < 0.02
    assert np.abs(got - plain).mean() > 2


def test_several_loras_add_up(tmp_path, dev_folder):
    state, facts = as_diffusers()
    path = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path, facts)
    twice = pixels(Flux2.load(dev_folder, acceleration="none", lora=[(path, 0.25), (path, 0.75)]))
    once = pixels(Flux2.load(dev_folder, acceleration="none", lora=path))
    assert np.abs(twice - once).max() <= 2


def test_several_loras_are_rounded_once():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(32, 48, bias=False, dtype=torch.bfloat16) for name in "abc"})
    before = {name: layer.weight.detach().clone() for name, layer in net.items()}
    named = [
        ({name: lora.Update(torch.randn(4, 32), torch.randn(48, 4), 0.1) for name in names}, 0.7)
        for names in ("ab", "bc")
    ]
    lora.merge(net, named)
    for name, layer in net.items():
        added = sum(0.7 * 0.1 * (one[name].up @ one[name].down) for one, _ in named if name in one)
        exact = before[name].float() + added
        assert ((layer.weight - exact).abs() <= exact.abs() * 2**-8 * 1.001).all(), name


def test_what_is_merged_goes_to_the_device_at_once(tmp_path, dev_folder):
    """One weight after the other: host memory may be too short for all of them. What is not changed stays in its file."""
    state, facts = as_diffusers()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "lora.safetensors", facts)
    flux = Flux2.load(dev_folder, dtype="float32")
    source = load.Source(flux.checkpoint, "transformer", (Lora(tmp_path / "lora.safetensors"),))
    with meta():
        net = Flux2Transformer(flux._components.transformer.config)
    held = replace(flux.plan.transformer, placement="resident")
    load.fill(net, held, "float32", source, torch.device("meta"))
    assert {name.removesuffix(".weight") for name, value in net.named_parameters() if value.is_meta} == set(TARGETS)


def test_a_lora_of_another_model_is_refused(tmp_path, dev_folder):
    path = tmp_path / "lora.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(4, 6144), f"{name}.lora_B.weight": torch.zeros(6144, 4)}, path)
    with pytest.raises(WeightsDamagedError, match="another FLUX.2 family"):
        Flux2.load(dev_folder, lora=path)


def test_what_is_no_lora_is_refused(tmp_path, dev_folder):
    path = tmp_path / "lora.safetensors"
    save_file({"a.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsDamagedError):
        Flux2.load(dev_folder, lora=path)
    state, facts = as_diffusers(8, alpha_pattern={"(": 2})
    save_file(state, path, facts)
    with pytest.raises(WeightsDamagedError, match="how strong it is: .* cannot be read .missing"):
        Flux2.load(dev_folder, lora=path)
    save_file({**as_diffusers()[0], "transformer.proj_out.lora_magnitude_vector.weight": torch.ones(32)}, path)
    with pytest.raises(WeightsDamagedError, match="is a DoRA adapter, which is not supported yet"):
        Flux2.load(dev_folder, lora=path)
    with pytest.raises(WeightsDamagedError, match="no LoRA file"):
        Flux2.load(dev_folder, lora=tmp_path / "nowhere.safetensors")
