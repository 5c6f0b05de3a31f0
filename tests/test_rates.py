"""Rates: measured where asked for, kept for one device and one torch, and what plans go by from then on."""

import json
import tomllib
from dataclasses import replace

import pytest
from flux2_kernels.rates import MULTIPLES

from flux2_local import rates
from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.explore import family_architecture, hardware_rows
from flux2_local.hardware import ASSUMED_RAM, from_preset, probe, rate_of
from flux2_local.plan import Wishes, make_plan
from flux2_local.presets import EIGHT_BIT, config_folder, devices, models, tiers


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
    assert (
        "; 64.0 GiB of host memory (--ram) and 3 GB/s from the disk are taken"
        in figures(from_preset("rtx-4090"))[0].reason
    )


def test_eight_bit_rates_that_were_not_kept_follow_the_measured_one():
    card = from_preset("rtx-4090")
    kept = {"copy": 9e11, "link": 2e10, "bfloat16": 80e12, "float16": 80e12, "float32": 2e13}
    rates.write(rates.place(card), json.dumps(kept).encode())
    found = rates.measured(card)
    assert found.measured and found.flops["bfloat16"] == 80e12
    assert found.flops["int8"] == pytest.approx(80e12 * card.flops["int8"] / card.flops["bfloat16"])
    rates.write(rates.place(card), json.dumps(kept | {"int8": 3e14}).encode())
    assert rates.measured(card).flops["int8"] == 3e14


@pytest.mark.parametrize("name", [name for name, row in devices().items() if row.kind == "cuda"])
def test_the_tables_peaks_are_the_multiples_that_rooflines_use(name):
    row = tomllib.loads((config_folder() / "devices.toml").read_text("utf-8"))[name]
    for dtype, multiple in MULTIPLES[row["sm"]].items():
        assert row[EIGHT_BIT[str(dtype).removeprefix("torch.")]] == pytest.approx(multiple * row["tflops"], rel=0.02)
    assert len(devices()[name].eight_bit) == len(MULTIPLES[row["sm"]])


def test_every_device_says_where_its_rates_are_from():
    for name, row in devices().items():
        assert row.source and figures(from_preset(name, 2**38))[0].reason.count(row.source) == 1


def test_a_card_that_is_in_no_table_has_the_multiples_of_the_newest_that_is_no_newer():
    known = devices()
    for sm, kin in ((75, None), (80, "a100"), (87, "rtx-3090"), (100, "h100"), (121, "rtx-5090")):
        guessed = rate_of("NVIDIA Quadro X-1", sm, 60)
        assert guessed.eight_bit == (known[kin].eight_bit if kin else {}) and "guessed from 60" in guessed.source
