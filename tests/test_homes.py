"""Where weights wait that leave the device: what is planned, and what the link to a card takes of the host."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from test_plan import need
from torch import nn

from flux2_local import footprint, homes, weights
from flux2_local.candidates import HOST_RESERVE
from flux2_local.costs import Work
from flux2_local.hardware import from_preset
from flux2_local.model.meta import meta
from flux2_local.offload import link
from flux2_local.offload.streamed import Streamed
from flux2_local.plan import Wishes, make_plan
from flux2_local.presets import parse_bytes


class Events:
    """Stands in for a CUDA stream: what is asked of it has happened."""

    def wait_event(self, event):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


@pytest.fixture
def counting(monkeypatch):
    """CUDA's part of the link played by the host; the bytes of page-locked buffers that are alive."""
    alive = []

    def pinned(size, device):
        buffer = torch.empty(size, dtype=torch.uint8)
        alive.append(size)
        weakref.finalize(buffer.untyped_storage(), alive.remove, size)
        return buffer

    monkeypatch.setattr(link, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Events())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Events())
    return alive


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_the_link_takes_the_host_memory_that_is_planned(counting, tmp_path, share):
    """With some blocks in page-locked memory and the others through its two buffers, in the order of the calls."""
    path, stay = tmp_path / "w.safetensors", (1, 6)
    save_file({f"layers.{i}.weight": torch.full((100 + 400 * (i < 2), 256), float(i)) for i in range(8)}, path)
    network = nn.Module()
    with meta():
        network.layers = nn.ModuleList(nn.Linear(256, 100 + 400 * (i < 2), bias=False) for i in range(8))
    weights.fill(network, weights.fitting(network, weights.read_files([path]), "x"), dtype=None)
    held = footprint.Weights(tuple(layer.weight.nbytes for layer in network.layers), 0, 0, 0)
    one = homes.Traveller(held, True, stay)
    home = homes.homes({"transformer": one}, one.least + int(share * held.total))["transformer"]
    hold = Streamed(network, link.CudaLink(torch.device("cpu")), stay, home.mapped)
    most = sum(counting)
    for _ in range(2):
        with hold(), torch.inference_mode():
            for _ in range(3):
                for number, layer in enumerate(network.layers):
                    assert (layer(torch.ones(1, 256)) == 256 * number).all()
                    most = max(most, sum(counting))
    assert most <= home.size <= one.least + int(share * held.total)
    assert most == home.size if home.mapped else most == held.total
    hold.settle(stay, range(8))
    gc.collect()
    assert sum(counting) <= link.STAGES * max(held.blocks)


def test_a_system_that_refuses_to_pin_is_asked_once_and_its_error_ends_there(monkeypatch):
    """CUDA would raise it from the next kernel otherwise. ``left``: errors that it has not raised yet. It is asked with the link's
    device for the current one, as it is to give up what it locked: it works with the first card otherwise."""
    asked, left, told, current, freed = [], [], [], [], []

    @contextmanager
    def device(one):
        current.append(one)
        yield
        current.pop()

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            assert current == [torch.device("cpu")]
            asked.append(size)
            left.extend(["out of memory"] * (len(asked) > 2))
            return 2 if len(asked) > 2 else 0

        def cudaHostUnregister(self, address):
            freed.extend(current)
            return 0

    def synchronize(device):
        if left:
            raise RuntimeError(f"CUDA error: {left.pop()}")

    for name, stand_in in (
        ("cudart", Runtime),
        ("device", device),
        ("synchronize", synchronize),
        ("Stream", lambda device: Events()),
        ("stream", lambda stream: nullcontext()),
        ("current_stream", lambda device: Events()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    network = nn.Module()
    network.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))
    expected = [layer(torch.ones(4)) for layer in network.layers]
    hold = Streamed(network, link.CudaLink(torch.device("cpu"), told.append))
    assert len(asked) == 3 and not left and told == [link.UNPINNED]
    with hold(), torch.inference_mode():
        assert all(torch.equal(layer(torch.ones(4)), x) for layer, x in zip(network.layers, expected, strict=True))
    assert len(asked) == 3
    hold.release()
    del hold, network
    gc.collect()
    assert freed == [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("device", "ram", "variant", "tier"),
    [("rtx-4090", "64GiB", "standard", "none"), ("rtx-4060-ti-16gb", "32GiB", "turbo", "regular")],
)
def test_what_moves_in_every_step_has_host_memory_first(device, ram, variant, tier):
    """Where all of the transformer does not fit, nor the text encoder, but all that moves does."""
    plan = make_plan(need("dev", variant, tier, Work(steps=8)), from_preset(device, parse_bytes(ram)))
    assert plan.transformer.placement == plan.text_encoder.placement == "streamed"
    assert plan.transformer.mapped and set(plan.transformer.mapped) <= set(plan.transformer.stay)
    assert len(plan.text_encoder.mapped) == 30 and "what stays of the transformer and text encoder from disk" in str(
        plan
    )
    same = Wishes(quantize="none" if plan.transformer.format == plan.dtype else plan.transformer.format)
    hidden = make_plan(need("dev", variant, tier, Work(steps=8)), from_preset(device, parse_bytes("256GiB")), same)
    assert plan.step_seconds == pytest.approx(hidden.step_seconds, rel=0.01) and hidden.transformer.mapped == ()
    assert 0.9 * parse_bytes(ram) < plan.host_bytes <= parse_bytes(ram) - HOST_RESERVE


def test_more_host_memory_is_never_slower():
    sizes = ("8GiB", "12GiB", "20GiB", "28GiB", "36GiB", "48GiB", "64GiB", "128GiB")
    cards, int8 = (
        (from_preset("rtx-4060-ti-16gb", parse_bytes(size)) for size in sizes),
        Wishes(quantize="builtin-int8"),
    )
    plans = [make_plan(need("dev"), card, int8) for card in cards]
    assert all(plan.host_bytes <= parse_bytes(size) - HOST_RESERVE for plan, size in zip(plans, sizes, strict=True))
    steps = [plan.step_seconds for plan in plans]
    assert all(more <= 1.001 * less for less, more in pairwise(steps)) and steps[0] > 1.2 * steps[-1]


def test_blocks_from_files_are_spread_among_those_that_move():
    held = footprint.Weights((100,) * 20, 0, 0, 0)
    one = homes.Traveller(held, True, (3, 7, 11, 15, 19))
    home = homes.homes({"transformer": one}, one.least + 1000)["transformer"]
    moving = [n for n in home.mapped if n not in one.stay]
    assert len(moving) == 5 and set(one.stay) <= set(home.mapped) and not home.whole
    assert all(2 <= later - earlier <= 6 for earlier, later in pairwise(moving))
