"""Rates: measured once or where asked for, kept for one device and one torch, and what plans go by from then on."""

import json
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import WeakFileLock

from flux2_local import Flux2, PlanError, rates
from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.explore import family_architecture, hardware_rows
from flux2_local.hardware import ASSUMED_RAM, from_preset, probe, rate_of
from flux2_local.plan import Wishes, make_plan
from flux2_local.presets import EIGHT_BIT, config_folder, devices, models, tiers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(rates.SWITCH, "1")


@pytest.fixture
def machine(monkeypatch):
    """A CPU that is 1.5 times as fast as public figures say; how often it was measured."""
    times = []

    def measure(device, dtypes, seconds=None):
        times.append(device)
        public = replace(probe("cpu"), measured=False)
        return {"copy": 1.5 * public.memory_rate} | {name: 1.5 * public.flops[name] for name in dtypes}

    monkeypatch.setattr(rates, "measure", measure)
    return times


def load(**options):
    return Flux2.load("tiny", "flash", device="cpu", **options)


def said(flux):
    return next(choice for choice in flux.plan.choices if choice.what == "figures")


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


MULTIPLES = {
    80: {"int8": 2},
    86: {"int8": 4},
    89: {"int8": 4, "float8_e4m3fn": 2},
    90: {"int8": 2, "float8_e4m3fn": 2},
    120: {"int8": 4, "float8_e4m3fn": 2},
}
"""Dense 8-bit rates over bf16's, by SM. On GeForce cards (86, 89, 120) bf16 and fp8 with float32 accumulation run at half the
rate of the matrix units, int8 at the whole."""


@pytest.mark.parametrize("name", [name for name, row in devices().items() if row.kind == "cuda"])
def test_peaks_of_8_bit_are_to_that_of_bf16_as_the_matrix_units_are(name):
    row = tomllib.loads((config_folder() / "devices.toml").read_text("utf-8"))[name]
    found = {dtype: row[key] / row["tflops"] for dtype, key in EIGHT_BIT.items() if key in row}
    assert found == pytest.approx(MULTIPLES[row["sm"]], rel=0.02)


def test_every_device_says_where_its_rates_are_from():
    for name, row in devices().items():
        assert row.source and figures(from_preset(name, 2**38))[0].reason.count(row.source) == 1


def test_a_card_that_is_in_no_table_has_the_multiples_of_the_newest_that_is_no_newer():
    known = devices()
    for sm, kin in ((75, None), (80, "a100"), (87, "rtx-3090"), (100, "h100"), (121, "rtx-5090")):
        guessed = rate_of("NVIDIA Quadro X-1", sm, 60)
        assert guessed.eight_bit == (known[kin].eight_bit if kin else {}) and "guessed from 60" in guessed.source


# ---- by itself ----


def test_the_first_load_measures_and_the_plan_says_so(machine):
    public = probe("cpu")
    first, second = load(), load()
    assert machine == ["cpu"] and said(first) == said(second)
    assert said(first).value == "measured" and "measures again" in said(first).reason
    assert first.hardware.flops == {name: 1.5 * rate for name, rate in public.flops.items()} == probe("cpu").flops


def test_servers_measure_before_they_choose(machine):
    from flux2_local.endpoints import Pipelines

    plans = Pipelines({"model": "tiny", "device": "cpu"}).plans().values()
    assert machine == ["cpu"]
    assert {c.value for plan in plans for c in plan.choices if c.what == "figures"} == {"measured"}


@pytest.mark.parametrize("line", ["plan --model tiny", "plan --device rtx-4090 --model klein-4b", "--help"])
def test_what_loads_nothing_measures_nothing(machine, line):
    from typer.testing import CliRunner

    from flux2_local.cli import app

    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0 and done.output and not machine
    assert "plan" not in line or "figures: public" in done.output


@pytest.mark.parametrize("why", ["switched off", "a small budget", "no memory", "no folder"])
def test_where_nothing_is_measured(machine, monkeypatch, tmp_path, why):
    if why == "switched off":
        rates.once(probe("cpu"))
        machine.clear()
        monkeypatch.setenv(rates.SWITCH, "0")
    elif why == "no memory":
        monkeypatch.setitem(rates.ROOM, "cpu", 2**50)
    elif why == "no folder":
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    flux = load(vram="2GiB" if why == "a small budget" else None)
    assert not machine and said(flux).value == "public"


def test_what_is_switched_off_cannot_be_asked_for(monkeypatch):
    monkeypatch.setenv(rates.SWITCH, "0")
    with pytest.raises(PlanError, match="FLUX2_LOCAL_MEASURE=0.*Unset it"):
        rates.keep(probe("cpu"))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_rates_out_of_all_reason_are_discarded_and_not_measured_again(machine, monkeypatch, caplog, factor):
    hardware, believable = probe("cpu"), rates.measure
    monkeypatch.setattr(rates, "measure", lambda *a: {**believable(*a), "float32": factor * hardware.flops["float32"]})
    assert not rates.once(hardware).measured and not rates.once(hardware).measured and machine == ["cpu"]
    (record,) = (r for r in caplog.records if r.levelname == "WARNING")
    assert "float32" in record.getMessage() and "doctor --measure" in record.getMessage()
    assert rates.keep(hardware).measured, "whoever asks for it gets it"


def test_a_failure_is_no_error_and_is_tried_again(machine, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    good = rates.measure
    monkeypatch.setattr(rates, "measure", fail)
    assert said(load()).value == "public" and not list(rates.place(probe("cpu")).parent.glob("*.json"))
    monkeypatch.setattr(rates, "measure", good)
    assert said(load()).value == "measured"


def test_processes_wait_for_the_one_that_measures(machine):
    hardware = probe("cpu")
    path, kept = rates.place(hardware), {"copy": 1e10} | dict.fromkeys(hardware.flops, 1e11)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = WeakFileLock(path.with_suffix(".lock"))
    with ThreadPoolExecutor() as pool, lock:
        waits = pool.submit(rates.once, hardware)
        assert not wait([waits], timeout=0.3).done
        rates.write(path, json.dumps(kept).encode())
    assert waits.result().memory_rate == 1e10 and not machine


def test_none_waits_for_ever(machine, monkeypatch):
    monkeypatch.setattr(rates, "PATIENCE", 0.2)
    path = rates.place(probe("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_suffix(".lock")), ThreadPoolExecutor() as pool:
        assert not pool.submit(rates.once, probe("cpu")).result().measured and not machine


def test_a_moment_of_noise_moves_no_rate():
    pause = iter([0.0] * 3 + [0.05] * 3)

    def disturbed():
        time.sleep(0.005 + next(pause, 0.0))

    took = rates.typical({"a": disturbed, "b": lambda: time.sleep(0.002)}, lambda: None, 0.3)
    assert took["a"] < 0.02 and took["b"] < 0.01


def test_waiting_for_a_card_counts_for_little(monkeypatch):
    now, waits = [0.0], []

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = {"copy": lambda: passes(125e-6), "product": lambda: passes(0.02)}
    took = rates.typical(calls, lambda: waits.append(passes(13e-6)), 0.15)
    assert took == pytest.approx({"copy": 125e-6, "product": 0.02}, rel=0.005)
    assert now[0] < 0.5


def test_fp8_products_are_summed_as_in_layers(monkeypatch):
    import torch
    from flux2_kernels.gpu.scaled_mm import linear_w8a8

    asked = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **options: asked.append(options) or torch.zeros(16, 16))
    eight, one = torch.ones(1, 16, 16).to(torch.float8_e4m3fn), torch.ones(1, 16, 1)
    linear_w8a8(eight, one, eight[0], one[0, :, 0], torch.bfloat16)
    rates.multiplied("float8_e4m3fn", eight[0], eight[0])()
    assert asked[0]["use_fast_accum"] == asked[1]["use_fast_accum"]


def test_measuring_leaves_the_users_random_numbers_alone(monkeypatch):
    import torch

    monkeypatch.setattr(rates, "SMALL", 64)
    monkeypatch.setitem(rates.PRODUCT, "cpu", 64)
    monkeypatch.setattr(rates, "COPIED", 2**16)
    before = torch.get_rng_state()
    rates.measure("cpu", ["float32"], 0.001)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_8_bit_product_that_there_is_not_is_not_measured(monkeypatch):
    import torch

    def refused(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(rates, "SMALL", 64)
    monkeypatch.setitem(rates.PRODUCT, "cpu", 64)
    monkeypatch.setattr(rates, "COPIED", 2**16)
    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert set(rates.measure("cpu", ["float32", "int8", "float8_e4m3fn"], 0.001)) == {"copy", "float32", "int8"}
    monkeypatch.setattr(torch, "mm", refused)
    with pytest.raises(RuntimeError, match="no kernel"):
        rates.measure("cpu", ["float32"], 0.001)
