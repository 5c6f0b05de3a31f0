"""Rates: measured where asked for, kept for one device and one torch, and what plans go by from then on."""

import json
from dataclasses import replace

import pytest

from flux2_local import rates
from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.explore import family_architecture, hardware_rows
from flux2_local.hardware import ASSUMED_RAM, from_preset, probe
from flux2_local.plan import Wishes, make_plan
from flux2_local.presets import models, tiers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def figures(hardware):
    need = Need("klein-4b", "standard", tiers()["regular"], family_architecture(models()["klein-4b"]), Work())
    plan = make_plan(need, hardware, Wishes(vram=hardware.free))
    return next(choice for choice in plan.choices if choice.what == "figures"), plan


def test_rates_are_measured_kept_and_used():
    before = probe("cpu")
    assert not before.measured and "--measure" in hardware_rows(before)["matrix products"]
    after = rates.keep(before)
    found = json.loads(rates.place(before).read_bytes())
    assert set(found) == {"copy", *before.flops} and all(rate > 1e6 for rate in found.values())
    assert after.measured and after.flops == {dtype: found[dtype] for dtype in before.flops}
    assert after.memory_rate == found["copy"] and probe("cpu").flops == after.flops
    assert "measured" in hardware_rows(after)["matrix products"]


def test_plans_follow_the_kept_rates():
    card = replace(from_preset("rtx-4090"), free=16 * 2**30)
    names = ("copy", "link", *card.flops)
    kept = dict.fromkeys(names, 1e12) | {"link": card.link_rate, "copy": card.memory_rate}
    rates.write(rates.place(card), json.dumps(kept).encode())
    slow = rates.measured(card)
    (choice, first), (_, again), (public, fast) = figures(slow), figures(slow), figures(card)
    assert choice.value == "measured" and public.value == "public" and first == again
    assert first.seconds > 10 * fast.seconds


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"copy": "x"}', b'{"copy": 0, "float32": 1}'])
def test_a_file_that_is_no_good_is_passed_over(content):
    hardware = probe("cpu")
    rates.write(rates.place(hardware), content)
    assert rates.measured(hardware) is hardware


def test_another_torch_or_device_has_rates_of_its_own(monkeypatch):
    import torch

    hardware = probe("cpu")
    places = {rates.place(hardware), rates.place(replace(hardware, cores=hardware.cores + 1))}
    monkeypatch.setattr(torch, "__version__", "0")
    assert len(places | {rates.place(hardware)}) == 3


def test_a_described_machine_has_the_host_memory_that_the_plan_says():
    assert from_preset("rtx-4090").ram == ASSUMED_RAM
    assert "64.0 GiB of host memory are taken for given" in figures(from_preset("rtx-4090"))[0].reason
