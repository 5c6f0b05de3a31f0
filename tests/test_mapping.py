"""Mapped tensors: what the file says, in memory before they are asked for, and gone when nobody has them."""

import json
import struct
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import loading
from flux2_local import OutputError, WeightsDamagedError, mapping, weights
from flux2_local.files import replacing
from flux2_local.model.meta import meta
from flux2_local.offload import resident, staged
from flux2_local.offload.tensors import Packed, hung
from flux2_local.quant import builtin, convert
from flux2_local.quant.recipe import Recipe

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")

COUNT, ROWS, COLUMNS = 24, 2048, 1024
LAYER = 2 * ROWS * COLUMNS
"""Bytes of a layer in 16 bit."""
SLACK = 3 * 2**20
"""Bytes of pages that may come with others: the interpreter's own files."""


class Net(nn.Module):
    """As many layers under the names that are quantized, and one value that never is."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(COUNT))
        self.norm = nn.Parameter(torch.ones(8))


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mapping") / "model.safetensors"
    state = {f"layers.{i}.weight": torch.randn(ROWS, COLUMNS).bfloat16() for i in range(COUNT)}
    save_file({**state, "norm": torch.ones(8).bfloat16()}, path)
    return path


def read(path, dtype=None):
    with meta():
        net = Net().bfloat16()
    weights.fill(net, weights.fitting(net, weights.read_files([path]), "x"), dtype=dtype)
    return net


@pytest.fixture
def most(monkeypatch):
    """The most that was mapped, beyond what was at first, wherever it is looked."""
    monkeypatch.setattr(mapping, "AHEAD", 2 * LAYER)
    monkeypatch.setattr(convert, "READ_AHEAD", 2 * LAYER)
    first, seen = loading.mapped(), []

    def look():
        seen.append(loading.mapped() - first)
        return max(seen)

    return look


def looking(monkeypatch, owner, name, look):
    before = getattr(owner, name)

    def looked(*arguments):
        look()
        result = before(*arguments)
        look()
        return result

    monkeypatch.setattr(owner, name, looked)


def test_every_type_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "all.safetensors"
    kinds = mapping.DTYPES.values()
    state = {str(kind): torch.randint(0, 2, (3, 5)).to(kind) for kind in kinds}
    save_file({**state, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, path)
    wanted, got = load_file(path), dict(weights.read_files([path]))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        assert torch.equal(got[name].float(), value.float())


def test_files_are_mapped_to_be_read_alone_on_windows(tmp_path, monkeypatch):
    """It sets memory aside for a file that could be written to, all of it. torch warns of what cannot be, once in a process."""
    save_file({"a": torch.arange(6.0)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(sys, "platform", "win32")
    assert memoryview(mapping.mapped(tmp_path / "w.safetensors")).readonly
    ((_, value),) = weights.read_files([tmp_path / "w.safetensors"])
    assert torch.equal(value, torch.arange(6.0))


def test_a_file_that_grows_is_an_ordinary_one_or_none(tmp_path):
    tensors = {"a": torch.randn(3, 8), "b": torch.arange(16, dtype=torch.int8), "c": torch.randn(4, 4).bfloat16()}
    with replacing(tmp_path / "w.safetensors") as part, weights.growing(part, {"of": "it"}) as add:
        for name, value in tensors.items():
            add(name, value)
    got = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(got[name], value) for name, value in tensors.items()) and len(got) == 3
    assert all(torch.equal(value, tensors[name]) for name, value in weights.read_files([tmp_path / "w.safetensors"]))
    odd = pytest.raises(OutputError, match="13 bytes")
    with odd, replacing(tmp_path / "x.safetensors") as part, weights.growing(part, {}) as add:
        add("a", torch.zeros(13, dtype=torch.int8))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def written(path, entries, size=16):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F6", "shape": [4], "data_offsets": [0, 16]}, "type F6"),
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "16 bytes where F32 .5. takes 20"),
        ({"dtype": "F32", "data_offsets": [0, 16]}, "cannot be read"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "cannot be read"),
        ({"dtype": "F32", "shape": [4], "data_offsets": ["0", 16]}, "cannot be read"),
    ],
)
def test_a_header_that_describes_no_tensor(tmp_path, entry, words):
    path = written(tmp_path / "x.safetensors", {"a": entry})
    with pytest.raises(WeightsDamagedError, match=words):
        list(weights.read_files([path]))


def test_everything_comes_in_order_and_an_end_before_the_end_is_fine(shard):
    names = [name for name, _ in weights.read_files([shard])]
    got = mapping.fetched(weights.read_files([shard]), lambda one: [one[1]])
    assert next(got)[0] == names[0]
    got.close()
    assert [name for name, _ in mapping.fetched(weights.read_files([shard]), lambda one: [one[1]])] == names


@linux
def test_what_is_loaded_is_in_memory_and_nothing_else(shard):
    first = loading.mapped()
    net = read(shard)
    assert loading.mapped() - first < SLACK, "nothing is read for a network that may stay on the disk"
    resident.hold(net, torch.device("cpu"))
    assert abs(loading.mapped() - first - COUNT * LAYER) < SLACK
    del net.layers[3:]
    assert abs(loading.mapped() - first - 3 * LAYER) < SLACK
    staged.hold(read(shard), torch.device("cpu"))
    del net
    assert loading.mapped() - first < SLACK


@linux
def test_another_type_is_made_without_two_whole_copies(shard, most, monkeypatch):
    looking(monkeypatch, weights, "assign", most)
    net = read(shard, torch.float32)
    assert 0 < most() <= mapping.AHEAD + 3 * LAYER + SLACK
    wanted = load_file(shard)
    assert all(torch.equal(value, wanted[name].float()) for name, value in net.named_parameters())


@linux
def test_layers_are_quantized_without_two_whole_copies(shard, most, monkeypatch):
    looking(monkeypatch, builtin, "quantize", most)
    convert.convert(read(shard), Recipe("builtin-int8"), torch.bfloat16, torch.device("cpu"))
    assert 0 < most() <= mapping.AHEAD + 3 * LAYER + SLACK


@linux
def test_blocks_are_packed_without_two_whole_copies(shard, most):
    net = read(shard)
    blocks = [Packed(layer) for layer in net.layers]
    for block in blocks:
        block.pack(torch.empty(block.size, dtype=torch.uint8))
        most()
    assert most() <= 2 * LAYER + SLACK
    wanted = load_file(shard)
    assert all(torch.equal(layer.weight, wanted[f"layers.{i}.weight"]) for i, layer in enumerate(net.layers))


@linux
def test_the_way_to_a_device_leaves_nothing_on_the_host(shard, most, monkeypatch):
    def copied(value, device):
        most()
        return nn.Parameter(value.detach().clone(), requires_grad=False)

    monkeypatch.setattr(resident, "moved", copied)
    net = read(shard)
    resident.hold(net, torch.device("meta"))
    assert 0 < most() <= mapping.AHEAD + 3 * LAYER + SLACK
    assert np.array_equal(net.layers[7].weight.float().numpy(), load_file(shard)["layers.7.weight"].float().numpy())
    assert len(hung(net)) == COUNT + 1


@linux
@pytest.mark.parametrize("quantize", ["none", "builtin-int8"])
def test_the_benchmark_finds_a_cold_load_whole(dev_folder, tmp_path, monkeypatch, quantize):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources, files = loading.files_of(str(dev_folder), "transformer", quantize)
    made = loading.load_here(str(dev_folder), "transformer", quantize, [])
    try:
        loading.drop(sources + files)
    except SystemExit as problem:
        pytest.skip(str(problem))
    one = loading.load_here(str(dev_folder), "transformer", quantize, files)
    assert (one.before, one.after, one.held) == (0, 1, made.held) and not one.note
    load = {"network": "transformer", "quantize": quantize, "file_bytes": 2e9, "new_memory": 1e9, "shard_bytes": 4e9}
    rounds = [{"disk": {"plain": 2.0, "direct": 1.0}, "load": asdict(one), "ratio": 0.5}]
    text = loading.table([{**load, "made": asdict(made), "rounds": rounds}])
    assert f"| {quantize} | 2.00 | 2.00 |" in text and "| 0.50 | 0.50–0.50 |" in text and "shard has 4.00" in text
