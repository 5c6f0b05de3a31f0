"""Streaming on links without a card: the same pixels, the overlap that is predicted, and nothing left behind."""

import gc
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flux2_local import Flux2, costs, footprint
from flux2_local.explore import family_architecture
from flux2_local.offload import streamed
from flux2_local.offload.simulated import SimulatedLink, VirtualLink
from flux2_local.offload.streamed import Streamed
from flux2_local.offload.tensors import Packed, hung
from flux2_local.presets import models
from flux2_local.progress import Reporter

FIELDS = {"image_size": "square", "seed": 3, "num_inference_steps": 4, "enable_safety_checker": False}
LAYERS = 30
"""Of the small random models' text encoders, as many as are read."""


def pixels(flux):
    return np.asarray(flux.generate("a red boat", **FIELDS).images[0].image)


def streaming(folder, stay, text=(), **options):
    """A model whose transformer and text encoder stream, and their links."""
    flux = Flux2.load(folder, **options)
    c, links = flux._components, (SimulatedLink(), SimulatedLink())
    holds = Streamed(c.transformer, links[0], stay), Streamed(c.text_encoder, links[1], text)
    flux._components = replace(c, hold_transformer=holds[0], hold_text_encoder=holds[1])
    return flux, links


@pytest.fixture(scope="module")
def expected(dev_folder):
    return pixels(Flux2.load(dev_folder))


@pytest.mark.parametrize("stay", [(), (0,), (0, 2, 4), (1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_pixels_are_those_of_a_resident_model_whatever_stays(dev_folder, expected, stay):
    text = tuple(range(0, LAYERS, 3))
    flux, (link, text_link) = streaming(dev_folder, stay, text)
    holds = flux._components.hold_transformer, flux._components.hold_text_encoder
    assert np.array_equal(pixels(flux), expected)
    sizes = [block.size for block in holds[0].blocks]
    moving = sum(size for number, size in enumerate(sizes) if number not in stay)
    ahead = sorted((size for number, size in enumerate(sizes) if number not in stay), reverse=True)[: streamed.RING]
    assert sum(sizes) + 3 * moving <= link.copied <= sum(sizes) + 3 * moving + sum(ahead)
    assert text_link.copied >= sum(block.size for block in holds[1].blocks)


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
    for stay in ((), (0, 3)):
        flux, _ = streaming("tiny", stay)
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


def test_a_merged_lora_streams(tmp_path, dev_folder):
    from safetensors.torch import save_file

    name, generator = "transformer.single_transformer_blocks.1.attn.to_out", torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 192), (48, 4)))
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    wanted = pixels(Flux2.load(dev_folder, lora=str(tmp_path / "lora.safetensors")))
    flux, _ = streaming(dev_folder, (1,), lora=str(tmp_path / "lora.safetensors"))
    assert np.array_equal(pixels(flux), wanted)
    assert not np.array_equal(wanted, pixels(Flux2.load(dev_folder)))


def test_other_blocks_may_stay_from_one_use_to_the_next(dev_folder, expected):
    flux, _ = streaming(dev_folder, ())
    for stay in ((0, 2), (3,), ()):
        flux._components.hold_transformer.stay = frozenset(stay)
        assert np.array_equal(pixels(flux), expected)


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


def timed(sizes, seconds, link, stay):
    network = nn.Module()
    network.layers = nn.ModuleList(Timed(size, seconds, link, link.device) for size in sizes)
    return network, Streamed(network, link, stay)


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
    """At full size, for all shares of blocks that stay; ``balance``: copying all blocks takes so many times the computing."""
    sizes = footprint.weights(family_architecture(models()[name]), "transformer", "bfloat16", None).blocks
    compute, passes = 1.0, 6
    rate = sum(sizes) / (balance * compute)
    for share in range(0, 65, 4):
        stay = costs.blocks_that_stay(sizes, max(sizes) * share / 64)
        link = VirtualLink(rate)
        network, hold = timed(sizes, compute / len(sizes), link, stay)
        ends = []
        with hold():
            for _ in range(passes):
                for layer in network.layers:
                    layer()
                ends.append(link.now)
        first, step = costs.stream_seconds(compute, sizes, stay, rate, streamed.RING)
        assert (ends[-1] - ends[0]) / (passes - 1) == pytest.approx(step, rel=0.05), (share, len(stay))
        assert ends[0] == pytest.approx(first, rel=0.05), (share, len(stay))
        moving = sum(size for number, size in enumerate(sizes) if number not in stay)
        assert 0.999 * max(compute, moving / rate) <= step <= 1.2 * max(compute, moving / rate), (share, len(stay))


def test_blocks_that_stay_range_from_none_to_all():
    sizes = (200, 200, *[100] * 10)
    assert costs.blocks_that_stay(sizes, 200) == () and costs.blocks_that_stay(sizes, 0) == tuple(range(12))
    counts = [len(costs.blocks_that_stay(sizes, pace)) for pace in range(0, 201, 10)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 6
