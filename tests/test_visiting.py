"""What only makes the schedule's table: on the device while one is made, and made once for every schedule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_plan import need
from torch import nn

from flux2_local import Flux2, footprint
from flux2_local.candidates import LAYOUTS, Draft, Terms
from flux2_local.hardware import from_preset
from flux2_local.model.blocks import SCHEDULE
from flux2_local.offload import resident, staged, visiting
from flux2_local.offload.tensors import hung

FIELDS = {"image_size": "square", "seed": 3, "num_inference_steps": 4, "enable_safety_checker": False}


def pixels(flux, **fields):
    return np.asarray(flux.generate("a red boat", **{**FIELDS, **fields}).images[0].image)


@pytest.mark.parametrize("placement", [resident, staged])
def test_modulations_leave_when_the_table_is_made_and_come_for_another(dev_folder, placement, monkeypatch):
    """On a device whose memory is the host's, to which weights are copied. Those that are loaded as another type than the files'
    are aligned as copies are, which rounding depends on."""
    flux = Flux2.load(dev_folder, dtype="bfloat16")
    wanted = [pixels(flux), pixels(flux, num_inference_steps=5)]
    net, came = flux._components.transformer, []

    def copied(value, device):
        there = value.detach().clone()
        came.append(there.untyped_storage().data_ptr())
        return nn.Parameter(there, requires_grad=False)

    for module in (placement, visiting):
        monkeypatch.setattr(module, "moved", copied)
    own = [value for name in SCHEDULE for _, value in hung(getattr(net, name))]
    for module in (net.time_guidance_embed, net.transformer_blocks[0]):
        module._forward_pre_hooks.clear()  # of its placement when it was loaded
    flux._components = replace(flux._components, hold_transformer=placement.hold(net, torch.device("cpu")))
    net.tables._made.clear()
    counts, inside = [], []
    net.transformer_blocks[0].register_forward_pre_hook(lambda *_: inside.append(net.norm_out.linear.weight is own[-1]))
    for steps in (4, 4, 5, 4, 5):
        before = len(came)
        assert np.array_equal(pixels(flux, num_inference_steps=steps), wanted[steps - 4])
        counts.append(len(came) - before)
    again = len(hung(net)) - len(own) if placement is staged else 0
    assert [count - again for count in counts] == [len(own), 0, len(own), 0, 0]
    assert all(inside) and all(a is b for (_, a), b in zip(hung(net.norm_out), own[-1:], strict=True))


def test_what_came_leaves_when_the_rest_cannot_come(dev_folder, monkeypatch):
    """As where the device's memory runs out, or somebody interrupts."""
    net, asked, real = Flux2.load(dev_folder)._components.transformer, [], visiting.moved

    def crowded(value, device):
        asked.append(value)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(value, device)

    own = [value for name in SCHEDULE for _, value in hung(getattr(net, name))]
    net.time_guidance_embed._forward_pre_hooks.clear()  # of its placement when it was loaded
    monkeypatch.setattr(visiting, "moved", crowded)
    hold = resident.hold(net, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt), hold():
        net.modulation(torch.tensor(0.5), 2.5)
    left = [value for name in SCHEDULE for _, value in hung(getattr(net, name))]
    assert all(a is b for a, b in zip(left, own, strict=True))
    asked[:] = [None] * 3
    with hold():
        net.modulation(torch.tensor(0.5), 2.5)
    assert len(asked) == 3 + len(own)


def test_tables_are_made_once_and_the_oldest_leaves(dev_folder, monkeypatch):
    flux, made = Flux2.load(dev_folder), []
    net = flux._components.transformer
    net.time_guidance_embed.register_forward_hook(lambda *_: made.append(1))
    pixels(flux, num_images=2)
    pixels(flux, seed=9)
    assert len(made) == 4
    pixels(flux, guidance_scale=3.0)
    assert len(made) == 8
    for number in range(4, 8):
        net.tables.get(number, list)
    pixels(flux)
    assert len(made) == 12


def test_plans_count_them_only_while_a_table_is_made():
    terms = Terms(need("dev"), from_preset("h200"), "bfloat16", 10**12, "triton", "sdpa", False, False)
    one = Draft(terms, None, LAYOUTS[0])
    networks = [one.weights(name) for name in ("transformer", "text_encoder", "vae")]
    tables, schedule = footprint.tables(one.setup, terms.need.work), networks[0].schedule
    assert schedule == pytest.approx(1.44e9, rel=0.01) and tables < 0.02 * schedule
    workspace = footprint.workspace(terms.hardware)
    assert one.kept == sum(held.total for held in networks) - schedule + tables + workspace
    assert one.denoising(()) >= one.kept + schedule + footprint.sampling(one.setup, terms.need.work)
    here = Draft(replace(terms, hardware=from_preset("cpu-8")), None, LAYOUTS[0])
    whole = sum(here.weights(name).total for name in ("transformer", "text_encoder", "vae"))
    assert here.kept == whole + tables, "they have no other place there"
