"""Streaming on links without a card: the same pixels, the overlap that is predicted, and nothing left behind."""

import gc
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from simulated import SimulatedLink, VirtualLink
from test_torch_compile import SIZES, forward, fresh, network  # noqa: F401
from torch import nn
from torch._dynamo.utils import counters

from flux2_local import Flux2, costs, footprint
from flux2_local import attention as backends
from flux2_local.explore import family_architecture
from flux2_local.model.compiled import compile_blocks
from flux2_local.model.ops import REFERENCE
from flux2_local.offload import streamed
from flux2_local.offload.streamed import Streamed
from flux2_local.offload.tensors import Packed, hung
from flux2_local.presets import models
from flux2_local.progress import Reporter
from flux2_local.quant.convert import convert
from flux2_local.quant.recipe import Recipe

FIELDS = {"image_size": "square", "seed": 3, "num_inference_steps": 4, "enable_safety_checker": False}
LAYERS = 30
"""Of the small random models' text encoders, as many as are read."""


def pixels(flux):
    return np.asarray(flux.generate("a red boat", **FIELDS).images[0].image)


def streaming(folder, stay, text=(), mapped=(), **options):
    """A model whose transformer and text encoder stream, and their links."""
    flux = Flux2.load(folder, **options)
    c, links = flux._components, (SimulatedLink(), SimulatedLink())
    layers = [n for n in mapped if n < len(c.text_encoder.layers)]
    holds = Streamed(c.transformer, links[0], stay, mapped), Streamed(c.text_encoder, links[1], text, layers)
    flux._components = replace(c, hold_transformer=holds[0], hold_text_encoder=holds[1])
    return flux, links


@pytest.fixture(scope="module")
def expected(dev_folder):
    return pixels(Flux2.load(dev_folder))


@pytest.mark.parametrize("stay", [(), (0,), (0, 2, 4), (1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_pixels_are_those_of_a_resident_model_whatever_stays(dev_folder, expected, stay):
    text = tuple(range(0, LAYERS, 3))
    flux, (way, text_way) = streaming(dev_folder, stay, text)
    holds = flux._components.hold_transformer, flux._components.hold_text_encoder
    assert np.array_equal(pixels(flux), expected)
    sizes = [block.size for block in holds[0].blocks]
    moving = sum(size for number, size in enumerate(sizes) if number not in stay)
    ahead = sorted((size for number, size in enumerate(sizes) if number not in stay), reverse=True)[: streamed.RING]
    assert sum(sizes) + 3 * moving <= way.copied <= sum(sizes) + 3 * moving + sum(ahead)
    assert text_way.copied >= sum(block.size for block in holds[1].blocks)


@pytest.mark.parametrize(
    ("stay", "mapped"), [((), (1,)), ((), (0, 2, 4)), ((0, 2), (1, 2)), ((1, 3), range(5)), (range(5), range(5))]
)
def test_pixels_are_the_same_whatever_comes_from_files(dev_folder, expected, stay, mapped):
    flux, (way, _) = streaming(dev_folder, stay, mapped=mapped)
    hold = flux._components.hold_transformer
    assert np.array_equal(pixels(flux), expected)
    assert [n for n, block in enumerate(hold.blocks) if block.host is None] == list(mapped)
    sizes = {n: hold.blocks[n].size for n in mapped}
    once, ever = sum(sizes.values()), sum(size for n, size in sizes.items() if n not in stay)
    assert once + 3 * ever <= way.loaded <= once + 3 * ever + streamed.RING * max(sizes.values())


def test_several_pictures_bring_the_transformer_once(dev_folder, expected, monkeypatch):
    stay, counts, move = (0, 1, 2, 3, 4), [], streamed.moved
    flux, (link, _) = streaming(dev_folder, stay)
    monkeypatch.setattr(streamed, "moved", lambda value, device: (counts.append(value.nbytes), move(value, device))[1])
    result = flux.generate("a red boat", num_images=3, **FIELDS)
    together, copied = sum(counts), link.copied
    counts.clear()
    assert np.array_equal(pixels(flux), expected) and np.array_equal(np.asarray(result.images[0].image), expected)
    assert flux._run({"prompt": "a", "num_images": 3, **FIELDS}, Reporter()).plan.batch < 3, "one after another"
    assert copied == sum(block.size for block in flux._components.hold_transformer.blocks) == link.copied - copied
    assert together == sum(counts)


def test_the_bundled_models_pixels_with_steps_skipped(tiny):
    wanted = np.asarray(
        tiny.generate("a red boat", num_inference_steps=10, image_size="square", seed=1).images[0].image
    )
    assert tiny.plan.cache is not None
    for stay, mapped in (((), ()), ((0, 3), (1, 3, 5))):
        flux, _ = streaming("tiny", stay, mapped=mapped)
        got = flux.generate("a red boat", num_inference_steps=10, image_size="square", seed=1)
        assert np.array_equal(np.asarray(got.images[0].image), wanted)


@pytest.mark.parametrize("name", ["builtin-int8", "builtin-int4", "torchao-int8", "quanto-int8"])
def test_quantized_weights_stream(dev_folder, name):
    wanted = pixels(Flux2.load(dev_folder, quantize=name))
    flux, _ = streaming(dev_folder, (0, 2), quantize=name)
    assert np.array_equal(pixels(flux), wanted)


def test_guidance_with_two_passes_streams(klein_base_folder):
    wanted = pixels(Flux2.load(klein_base_folder))
    flux, _ = streaming(klein_base_folder, (0, 3))
    assert np.array_equal(pixels(flux), wanted)


@pytest.mark.parametrize(
    ("layer", "rows", "columns"),
    [("single_transformer_blocks.1.attn.to_out", 48, 192), ("double_stream_modulation_img.linear", 288, 48)],
)
def test_a_merged_lora_streams(tmp_path, dev_folder, layer, rows, columns):
    name, generator = f"transformer.{layer}", torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, columns), (rows, 4)))
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    wanted = pixels(Flux2.load(dev_folder, lora=str(tmp_path / "lora.safetensors")))
    flux, _ = streaming(dev_folder, (1,), lora=str(tmp_path / "lora.safetensors"))
    assert np.array_equal(pixels(flux), wanted)
    assert not np.array_equal(wanted, pixels(Flux2.load(dev_folder)))


@pytest.mark.parametrize("quantize", ["", "builtin-int8"])
def test_compiled_blocks_stream(fresh, tmp_path, quantize):  # noqa: F811
    """Two graphs for every size, whatever buffer a block's weights are in, and what was computed without streaming. Where rows are
    quantized, the last block has one of its own: what follows it takes them as they are."""
    net, want = network(), network()
    for one in (net, want) if quantize else ():
        convert(one, Recipe(quantize), torch.float32, torch.device("cpu"))
    net.ops = want.ops = replace(REFERENCE, attend=backends.load("sdpa"))
    compile_blocks(net, tmp_path, backend="aot_eager")
    with Streamed(net, SimulatedLink(), (0, 3), ())():
        for tokens in SIZES:
            assert torch.equal(forward(net, tokens), forward(want, tokens))
    assert counters["stats"]["unique_graphs"] == (3 if quantize else 2) and not counters["graph_break"]


def test_other_blocks_may_stay_and_be_pinned_from_one_use_to_the_next(dev_folder):
    expected = pixels(Flux2.load(dev_folder, dtype="float32"))
    flux, _ = streaming(dev_folder, (), dtype="float32")
    hold = flux._components.hold_transformer
    for stay, mapped in (((0, 2), ()), ((3,), (1, 3)), ((), (0, 1)), ((1,), ())):
        hold.settle(stay, mapped)
        assert [n for n, block in enumerate(hold.blocks) if block.host is None] == list(mapped)
        assert np.array_equal(pixels(flux), expected)


def test_a_block_that_was_not_mapped_from_files_keeps_its_only_copy(dev_folder):
    flux = Flux2.load(dev_folder, dtype="bfloat16")  # the files are in float32
    wanted = pixels(flux)
    hold = Streamed(flux._components.transformer, SimulatedLink())
    flux._components = replace(flux._components, hold_transformer=hold)
    hold.settle((), (0, 1))
    assert not hold.mapped and np.array_equal(pixels(flux), wanted)


def test_nothing_is_left_on_the_device_after_a_use_that_failed(dev_folder, expected):
    flux, _ = streaming(dev_folder, (0, 3))
    hold = flux._components.hold_transformer

    def stop(progress):
        if progress.stage == "denoise" and progress.step == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        flux.generate("a red boat", progress=stop, **FIELDS)
    assert not hold._here and not hold._ring
    for block in hold.blocks:
        assert not block._built
        inside = block.host.untyped_storage().data_ptr()
        assert all(table[name].untyped_storage().data_ptr() == inside for (table, name), _ in block.home)
    assert np.array_equal(pixels(flux), expected)


def test_streaming_again_and_again_keeps_no_tensor(dev_folder):
    flux, _ = streaming(dev_folder, (0, 3))

    def alive():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    hold, mod = flux._components.hold_transformer, flux._components.transformer
    counts = []
    for turn in range(50):
        with hold(), torch.inference_mode():
            mod.modulation(torch.tensor(0.5), 2.5)
        if turn in (1, 49):
            counts.append(alive())
    pixels(flux)
    first = alive()
    pixels(flux)
    assert len(set(counts)) == 1 and alive() == first


def test_weights_of_any_layout_survive_packing():
    module = nn.Module()
    module.register_buffer("a", torch.arange(12.0).reshape(3, 4).t())
    module.register_buffer("b", torch.tensor(3, dtype=torch.int64))
    module.register_buffer("c", torch.arange(10, dtype=torch.int8)[::2])
    module.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16), requires_grad=False)
    before = {name: (value.clone(), value.stride()) for (_, name), value in hung(module)}
    packed = Packed(module)
    packed.pack(torch.empty(packed.size, dtype=torch.uint8))
    device = torch.empty(packed.size + 100, dtype=torch.uint8)
    packed.fill(device)
    packed.use(device)
    for (_, name), value in hung(module):
        assert torch.equal(value, before[name][0])
        assert value.untyped_storage().data_ptr() == device.untyped_storage().data_ptr()
    assert module.a.stride() == before["a"][1] and isinstance(module.weight, nn.Parameter)
    packed.forget()
    assert module.weight.untyped_storage().data_ptr() == packed.host.untyped_storage().data_ptr()


class Timed(nn.Module):
    """A block of ``size`` bytes that takes ``seconds``, on a virtual clock where there is one."""

    def __init__(self, size, seconds, link, device):
        super().__init__()
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device=device))
        self.seconds, self.link = seconds, link

    def forward(self):
        if isinstance(self.link, VirtualLink):
            self.link.now += self.seconds
        else:
            time.sleep(self.seconds)


def timed(sizes, seconds, link, stay, mapped=()):
    network = nn.Module()
    network.layers = nn.ModuleList(Timed(size, seconds, link, link.device) for size in sizes)
    return network, Streamed(network, link, stay, mapped)


@pytest.mark.alone
def test_copies_run_while_blocks_compute():
    """Ten blocks of 20 ms: alone 0.2 s, their copies 0.16 s; one after the other 0.36 s."""
    sizes, seconds = [80_000] * 10, 0.02
    network, hold = timed(sizes, seconds, SimulatedLink(rate=80_000 / 0.016), ())
    virtual = VirtualLink(80_000 / 0.016)
    twin, twin_hold = timed(sizes, seconds, virtual, ())
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        for net, use in ((network, hold), (twin, twin_hold)):
            with use():
                for layer in net.layers:
                    layer()
            if net is network:
                taken.append(time.perf_counter() - start)
                virtual.now = virtual._free = 0.0
    assert virtual.now == pytest.approx(0.016 + 10 * 0.02, rel=0.02)
    assert virtual.now * 0.98 < min(taken) < 0.75 * (0.16 + 0.2)


@pytest.mark.parametrize("name", ["dev", "klein-9b", "klein-4b"])
@pytest.mark.parametrize("balance", [0.5, 0.9, 1.0, 1.2, 3.0])
def test_the_schedule_takes_the_seconds_that_the_cost_model_says(name, balance):
    """At full size, for all shares of blocks that stay; ``balance``: copying all blocks takes so many times the computing. A
    sixteenth to all of the blocks come from files, which are read eight times as slowly."""
    sizes = footprint.weights(family_architecture(models()[name]), "transformer", "bfloat16", None).blocks
    compute, passes = 1.0, 6
    rate = sum(sizes) / (balance * compute)
    mixtures = [(share, range(len(sizes))[::step]) for share in range(0, 65, 16) for step in (1, 3, 16)]
    for share, mapped in [*((share, ()) for share in range(0, 65, 4)), *mixtures]:
        stay = costs.blocks_that_stay(sizes, max(sizes) * share / 64)
        link = VirtualLink(rate, rate / 8)
        network, hold = timed(sizes, compute / len(sizes), link, stay, mapped)
        ends = []
        with hold():
            for _ in range(passes):
                for layer in network.layers:
                    layer()
                ends.append(link.now)
        stream = costs.Stream(stay, rate, streamed.RING, tuple(mapped), rate / 8, streamed.READ_AHEAD)
        first, step = costs.stream_seconds(compute, sizes, stream)
        assert (ends[-1] - ends[0]) / (passes - 1) == pytest.approx(step, rel=0.05), (share, len(stay))
        assert ends[0] == pytest.approx(first, rel=0.05), (share, len(stay))
        bound = max(compute, stream.moving(sizes))
        assert 0.999 * bound <= step <= 1.2 * bound, (share, len(stay), len(mapped))


def test_blocks_that_stay_range_from_none_to_all():
    sizes = (200, 200, *[100] * 10)
    assert costs.blocks_that_stay(sizes, 200) == () and costs.blocks_that_stay(sizes, 0) == tuple(range(12))
    counts = [len(costs.blocks_that_stay(sizes, pace)) for pace in range(0, 201, 10)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 6
