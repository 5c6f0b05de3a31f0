"""A transformer in one file: the hub's names, value by value, and never in memory as a whole in another form."""

import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from components import TRANSFORMER
from safetensors.torch import load_file, save_file
from test_loading import bfl_names, write_gguf

from benchmarks import loading
from flux2_local import WeightsDamagedError, load, mapping, single, store, weights
from flux2_local.model.meta import meta
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.plan import ComponentPlan

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")

LARGE = TRANSFORMER | {"num_attention_heads": 6, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)}
WIDTH = 6 * 128
LAYER = 4 * 9 * WIDTH**2
"""Bytes of the largest layer in float32, a single block's first."""


def values(found):
    return {name: mapping.made(value, None) for name, value in found}


def network(checkpoint):
    with meta():
        return Flux2Transformer(TransformerConfig.from_dict(checkpoint.config("transformer")))


@pytest.fixture(scope="module")
def state(dev_folder):
    return load_file(dev_folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("prefix", ["", single.PREFIX])
def test_names_and_values_are_those_of_diffusers_converter(tmp_path, state, prefix):
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    published, path = bfl_names(state), tmp_path / "x.safetensors"
    save_file({prefix + name: value for name, value in published.items()}, path)
    wanted, got = convert_flux2_transformer_checkpoint_to_diffusers(dict(published)), values(single.read(path))
    assert got.keys() == wanted.keys() == state.keys()
    assert all(torch.equal(got[name], value) and torch.equal(value, state[name]) for name, value in wanted.items())


def test_what_is_in_the_hubs_naming_stays(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors")
    got = values(single.read(tmp_path / "x.safetensors"))
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "BF16", "F16", "F32"])
def test_gguf_values_are_those_of_the_whole_conversion(tmp_path, kind):
    """Blocks of 256 values; rows that are split into three, exchanged, and decoded a few at a time."""
    kind, draw = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    names = {"double_blocks.0.img_attn.qkv.weight": 3, "final_layer.adaLN_modulation.1.weight": 2, "img_in.weight": 1}
    writer, wanted = gguf.GGUFWriter(tmp_path / "x.gguf", "flux"), {}
    for name, count in names.items():
        if kind.name in ("Q4_K", "Q6_K"):  # which the package only reads
            packed = draw.integers(0, 60, (count * 5, 512 // block * size), dtype=np.uint8)
        else:
            packed = gguf.quants.quantize(draw.standard_normal((count * 5, 512), np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    q, k, v = wanted["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    shift, scale = wanted["final_layer.adaLN_modulation.1.weight"].chunk(2)
    stem = "transformer_blocks.0.attn."
    whole = {f"{stem}to_q.weight": q, f"{stem}to_k.weight": k, f"{stem}to_v.weight": v}
    whole |= {"norm_out.linear.weight": torch.cat([scale, shift]), "x_embedder.weight": wanted["img_in.weight"]}
    got = values(single.read(tmp_path / "x.gguf"))
    assert got.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(got[name].float().nan_to_num(), value.nan_to_num())


def test_decoding_by_rows_changes_nothing(monkeypatch):
    rows = torch.arange(35, dtype=torch.uint8).view(7, 5)
    coded = mapping.Coded(rows, (7, 5), lambda some: some.float() / 4)
    whole = coded.tensor(torch.bfloat16)
    monkeypatch.setattr(mapping, "DECODED", 10)
    assert torch.equal(coded.tensor(torch.bfloat16), whole) and whole.dtype == torch.bfloat16
    assert coded.tensor(None).dtype == torch.float32 and torch.equal(coded.tensor(None), rows / 4)


def eight_bits(state, scale_name, scale):
    out = {}
    for name, value in bfl_names(state).items():
        out[name] = value
        if name.endswith("linear1.weight"):
            out[name] = (value / 0.5).to(torch.float8_e4m3fn)
            out[name.replace("weight", scale_name)] = scale.clone()
            out[name.replace("weight", "input_scale")] = torch.tensor(3.0)
    return out


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_eight_bit_weights_are_multiplied_with_their_scale(tmp_path, dev_folder, state, name):
    path = tmp_path / "x.safetensors"
    save_file(eight_bits(state, name, torch.tensor(0.5)), path)
    net = network(store.find(dev_folder, "standard"))
    weights.fill(net, weights.fitting(net, single.read(path), "x"), dtype=torch.float32)
    for target, value in net.named_parameters():
        exact = "to_qkv_mlp_proj" not in target
        torch.testing.assert_close(value.data, state[target], rtol=0 if exact else 0.07, atol=0 if exact else 2e-3)


def test_scales_of_parts_are_refused(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file(eight_bits(state, "weight_scale", torch.ones(3)), path)
    with pytest.raises(WeightsDamagedError, match="single_blocks.0.linear1 in parts.*16 bit or GGUF"):
        list(single.read(path))


def test_a_gguf_kind_that_is_not_known_is_named(tmp_path):
    packed = torch.zeros(4, 64, dtype=torch.uint8)
    with pytest.raises(WeightsDamagedError, match="x.gguf stores a as Q8_1"):
        single.dequantised(gguf.GGMLQuantizationType.Q8_1, "x.gguf stores a", packed)


# ---- host memory ----


@pytest.fixture(scope="module")
def large(dev_folder, tmp_path_factory):
    """A model whose transformer has 260 MB in float32, and that transformer in the makers' files."""
    folder = tmp_path_factory.mktemp("large")
    base = folder / "base"
    shutil.copytree(dev_folder, base)
    config = base / "transformer" / "config.json"
    numbers = json.loads(config.read_text()) | LARGE
    config.write_text(json.dumps(numbers))
    net = network(store.find(base, "standard"))
    state = {name: torch.empty(value.shape).normal_() for name, value in net.named_parameters()}
    published = bfl_names(state)
    save_file(published, folder / "published.safetensors")
    write_gguf(folder / "published.gguf", published, gguf.GGMLQuantizationType.Q8_0)
    return folder


@linux
@pytest.mark.parametrize("quantize", ["none", "builtin-int8"])
def test_loading_gguf_takes_little_more_than_the_file_or_what_is_kept(large, monkeypatch, quantize):
    """A conversion of the whole has a copy of everything beside it, in float32."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))  # freed layers leave at once, as those of real size do
    path = large / "published.gguf"
    one = loading.load_apart(str(path), "transformer", quantize, [], str(large / "base"))
    assert one.held > 60e6 and not one.note
    assert one.held <= one.memory + 2**20 <= max(one.held, path.stat().st_size) + 3 * LAYER


@linux
def test_a_published_file_is_let_go_of_as_it_is_converted(large, monkeypatch):
    monkeypatch.setattr(mapping, "AHEAD", 2 * LAYER)
    seen, assign = [], weights.assign

    def looked(*arguments):
        seen.append(loading.mapped())
        assign(*arguments)

    monkeypatch.setattr(weights, "assign", looked)
    path, first = large / "published.safetensors", loading.mapped()
    net = network(store.find(path, "standard", large / "base"))
    weights.fill(net, weights.fitting(net, single.read(path), "x"), dtype=torch.bfloat16)
    assert LAYER < max(seen) - first <= mapping.AHEAD + 3 * LAYER < path.stat().st_size / 2


def test_what_is_converted_for_a_device_leaves_nothing_on_the_host(large, monkeypatch):
    """The device is torch's meta here: what goes there is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(large))
    device, source = torch.device("meta"), store.find(large / "published.gguf", "standard", large / "base")
    monkeypatch.setattr(weights, "write_file", lambda *_: None)  # there is nothing to write
    for form in ("bfloat16", "builtin-int8"):
        net = network(source)
        load.fill(net, ComponentPlan(form, "resident"), "bfloat16", load.Source(source, "transformer"), device)
        there = [value for value in (*net.parameters(), *net.buffers()) if value.device == device]
        assert sum(value.nbytes for value in there) > 0.9 * sum(v.nbytes for v in (*net.parameters(), *net.buffers()))
