"""Plans: what is chosen, why, what lost; and that what runs is what the plan says."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux2_local import BudgetError, Flux2, PlanError, RequestError, costs, footprint, hardware, load, store
from flux2_local.candidates import SYSTEM_RESERVE, Need
from flux2_local.costs import Work
from flux2_local.explore import family_architecture, fit, survey
from flux2_local.hardware import from_preset, probe
from flux2_local.model.blocks import SCHEDULE
from flux2_local.offload.tensors import ALIGNMENT
from flux2_local.plan import Wishes, built, explain, make_plan
from flux2_local.presets import devices, models, parse_bytes, show_bytes, tiers
from flux2_local.sampler import modulations
from flux2_local.schedule import make_schedule
from flux2_local.settings import find_hardware, make_settings


def need(name="klein-4b", variant="standard", tier="regular", work=None):
    preset = models()[name]
    return Need(name, variant, tiers()[tier], family_architecture(preset), work or Work())


def need_of(folder, tier, work=None):
    checkpoint = store.find(folder, "standard")
    return Need("m", "standard", tiers()[tier], load.architecture(checkpoint), work or Work())


def test_parameter_counts_are_the_published_ones():
    counts = {name: costs.parameters(family_architecture(models()[name])) for name in ("dev", "klein-9b", "klein-4b")}
    assert [round(c["transformer"] / 1e9, 2) for c in counts.values()] == [32.22, 9.08, 3.88]
    assert round(counts["dev"]["vae"] / 1e6) == 84
    whole = family_architecture(models()["dev"]).language
    cut = counts["dev"]["text_encoder"]
    layer = (cut - whole.vocab_size * whole.hidden_size) / 30
    assert 17e9 < cut < 18e9 and abs((cut + 10 * layer + whole.vocab_size * whole.hidden_size) / 1e9 - 23.57) < 0.1


@pytest.mark.parametrize(("name", "tera"), [("dev", 282.6), ("klein-9b", 75.0), ("klein-4b", 34.5)])
def test_flops_of_a_square_megapixel(name, tera):
    got = costs.step_flops(family_architecture(models()[name]), Work(1024, 1024)) / 1e12
    assert abs(got / tera - 1) < 0.04


def test_weights_in_memory_are_what_was_predicted(dev_folder):
    flux = Flux2.load(dev_folder, acceleration="none")
    c, arch = flux._components, load.architecture(flux.checkpoint)
    for name, module in (("transformer", c.transformer), ("text_encoder", c.text_encoder), ("vae", c.vae)):
        predicted = footprint.weights(arch, name, "float32", folded=flux.plan.fold_upsampling)
        padding = predicted.total - sum(v.nbytes for v in (*module.parameters(), *module.buffers()))
        assert 0 <= padding < ALIGNMENT * (len(predicted.blocks) or 1) and (predicted.blocks or padding == 0)
    assert all(p.dtype == torch.float32 for p in c.transformer.parameters())


@pytest.mark.parametrize("tier", ["none", "regular", "high"])
def test_what_runs_is_what_the_plan_says(dev_folder, tier):
    flux = Flux2.load(dev_folder, acceleration=tier)
    plan, c = flux.plan, flux._components
    for held, module in ((plan.transformer, c.transformer), (plan.text_encoder, c.text_encoder), (plan.vae, c.vae)):
        own = {p.dtype for name, p in module.named_parameters() if not name.startswith(SCHEDULE)}
        assert own == {load.DTYPES[held.format]}
        assert {str(p.device) for p in module.parameters()} == {plan.device}
    assert {p.dtype for n, p in c.transformer.named_parameters() if n.startswith(SCHEDULE)} == {
        load.DTYPES[plan.schedule]
    }
    conv = c.vae.decoder.up_blocks[0].resnets[0].conv1.weight
    assert conv.is_contiguous(memory_format=torch.channels_last) == plan.channels_last
    assert plan.acceleration == tier and explain(plan) == str(plan)


def test_sixteen_bit_has_the_exact_tiers_noise_levels(dev_folder):
    """On a CPU, where that tier computes in float32: rounding its modulations once is all that lies between the tables."""
    exact, half = (
        Flux2.load(dev_folder, acceleration=tier, dtype=dtype)
        for tier, dtype in (("none", "float32"), ("regular", "bfloat16"))
    )
    assert half.plan.schedule == "float32" and half._components.transformer.dtype == torch.bfloat16
    schedule = make_schedule(exact.checkpoint.preset.recipe("standard"), 4, 1024)
    tables = [modulations(f._components.transformer, schedule, 2.5, torch.device("cpu")) for f in (exact, half)]
    for want, got in zip(*tables, strict=True):
        for name in ("img", "txt", "single", "out"):
            for a, b in zip(getattr(want, name), getattr(got, name), strict=True):
                # The weights themselves were rounded, once, when the tier's were read.
                assert b.dtype == torch.bfloat16 and (a - b).abs().max() <= 0.02 * a.abs().max()


@pytest.mark.parametrize(
    ("device", "schedule"), [("cpu", "float32"), ("rtx-4090", "bfloat16"), ("apple-m3-max", "float16")]
)
def test_the_schedules_type_is_the_exact_tiers(device, schedule):
    assert make_plan(need(), from_preset(device) if device != "cpu" else probe("cpu")).schedule == schedule


def card(memory, ram="64GiB", **changes):
    return replace(from_preset("rtx-4090", parse_bytes(ram)), free=parse_bytes(memory), **changes)


def test_as_much_stays_on_the_device_as_fits():
    big, middle, small = (make_plan(need(), card(n), Wishes(quantize="none")) for n in ("22GiB", "11GiB", "5GiB"))
    held = [(p.transformer.placement, p.text_encoder.placement) for p in (big, middle, small)]
    assert held == [("resident", "resident"), ("resident", "streamed"), ("streamed", "streamed")]
    assert any("resident" in name and "needs" in why for c in small.choices for name, why in c.rejected)
    assert small.peak_bytes < parse_bytes("5GiB") and small.host_bytes > middle.host_bytes > big.host_bytes == 0


@pytest.mark.parametrize(("name", "memory"), [("dev", "22GiB"), ("klein-9b", "22GiB"), ("klein-4b", "11GiB")])
def test_expansion_is_planned_for_within_the_same_budget(name, memory):
    """Nothing is held otherwise for it than without, and what it needs beyond that is counted."""
    hardware = card(memory)
    without, plan = (make_plan(need(name, work=Work(chat=chat)), hardware) for chat in (0, costs.CHAT))
    assert without.expansion is None and without.expand_seconds == 0
    assert plan.expansion is not None and plan.expansion.format == plan.text_encoder.format
    assert plan.peak_bytes <= hardware.free - SYSTEM_RESERVE["cuda"] and built(plan) == built(without)
    language = footprint.weights(need(name).arch, "expansion", "bfloat16").blocks
    assert plan.text_encoder.placement == "streamed" and len(plan.expansion.stay) < len(language)
    assert plan.seconds > without.seconds + 1 and "layers stay" in explain(plan)
    with pytest.raises(BudgetError) as caught:
        make_plan(need(name, work=Work(chat=costs.CHAT)), hardware, Wishes(vram=2**30))
    smallest = caught.value.smallest
    assert make_plan(need(name, work=Work(chat=costs.CHAT)), hardware, Wishes(vram=smallest)).expansion is not None


def test_moving_weights_is_predicted_once_for_all_pictures_of_a_request():
    dense = Wishes(quantize="none")
    one, four = (make_plan(need(work=Work(steps=4, images=images)), card("5GiB"), dense) for images in (1, 4))
    assert one.transformer.placement == "streamed" and one.place_seconds == four.place_seconds > 0
    assert four.seconds - one.seconds == pytest.approx(3 * (4 * one.step_seconds + one.decode_seconds))


@pytest.mark.parametrize("name", ["klein-4b", "dev"])
def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(name):
    with pytest.raises(BudgetError) as caught:
        make_plan(need(name), card("23GiB"), Wishes(vram=parse_bytes("1GiB")))
    smallest = caught.value.smallest
    assert show_bytes(smallest) in str(caught.value) and smallest < parse_bytes("5GiB")
    assert make_plan(need(name), card("23GiB"), Wishes(vram=smallest)).transformer.placement == "streamed"
    with pytest.raises(BudgetError):
        make_plan(need(name), card("23GiB"), Wishes(vram=smallest - 2**20))


def test_a_picture_too_large_to_decode_whole_is_decoded_in_tiles(dev_folder, monkeypatch):
    with pytest.raises(BudgetError) as caught:
        make_plan(need_of(dev_folder, "regular", Work(1024, 1024)), probe("cpu"), Wishes(vram=1, quantize="none"))
    flux = Flux2.load(dev_folder, vram=caught.value.smallest, quantize="none")
    seen = []
    decode = flux._components.vae.decode

    def recorded(z, tile=None):
        if tile is not None:  # decoding a tile calls decode again, without
            seen.append(tile)
        return decode(z, tile or 0)

    monkeypatch.setattr(flux._components.vae, "decode", recorded)
    flux.generate("a boat", image_size="square_hd", num_inference_steps=4, enable_safety_checker=False)
    assert seen == [512]
    flux.generate("a boat", image_size="square", num_inference_steps=4, enable_safety_checker=False)
    assert seen == [512, 0]
    with pytest.raises(BudgetError):  # the exact tier decodes whole pictures, as the reference does
        make_plan(need_of(dev_folder, "none", Work(1024, 1024)), probe("cpu"), Wishes(vram=caught.value.smallest))


def test_larger_work_costs_more():
    small, large = (make_plan(need(work=Work(s, s)), from_preset("h200")) for s in (512, 2048))
    assert large.seconds > 8 * small.seconds and large.peak_bytes > small.peak_bytes


@pytest.mark.parametrize("device", list(devices()))
def test_every_known_device_can_be_planned_for(device):
    hw = from_preset(device, parse_bytes("32GiB"))
    for name in ("dev", "klein-9b", "klein-4b"):
        try:
            plan = make_plan(need(name), hw)
        except BudgetError as error:
            assert error.smallest > 0
            continue
        assert plan.peak_bytes <= hw.memory and 0 < plan.seconds < 1e5
        assert all(choice.reason for choice in plan.choices)


def test_host_memory_is_a_cpus_own_and_beside_a_card():
    size = parse_bytes("8GiB")
    for device in ("cpu-8", "cpu"):
        given = find_hardware(device, size)
        assert (given.memory, given.free, given.ram) == (size, size, size)
    assert from_preset("cpu-8").ram == from_preset("cpu-8").memory == devices()["cpu-8"].memory
    beside = find_hardware("rtx-4090", size)
    assert beside == replace(from_preset("rtx-4090"), ram=size) and beside.memory > size
    assert make_plan(need("klein-4b"), from_preset("cpu-8", size)).peak_bytes < size
    with pytest.raises(RequestError, match="--vram"):
        find_hardware("apple-m3-max", size)
    reasons = [make_plan(need(), from_preset(name)).choices[-1].reason for name in ("rtx-4090", "apple-m3-max")]
    assert ["--ram" in reason for reason in reasons] == [True, False]


def test_a_cards_convolutions_have_their_pictures_twice():
    """Group norms give contiguous ones: at the widest full-size convolution the block's input, what goes into the convolution, its
    copy, and half as many channels that come out."""
    setup = footprint.Setup(need().arch, "bfloat16", "cuda")
    channels = 3 * 256 + 128
    assert 1 <= footprint.decoding(setup, 512, 512, 0) / (2 * channels * 512 * 512) < 1.1


def test_host_memory_on_windows(tmp_path, monkeypatch):
    class System:
        class kernel32:
            def GlobalMemoryStatusEx(status):
                assert status._obj.size == 64
                status._obj.total, status._obj.available = 2**35, 2**34

    monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / "nowhere")
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    monkeypatch.setattr(hardware.ctypes, "windll", System, raising=False)
    assert hardware.host_memory() == (2**34, 2**35)


@pytest.mark.parametrize(
    ("limit", "used", "row"),
    [("memory.max", "memory.current", "{}_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file")],
)
def test_files_that_a_container_has_read_do_not_take_its_memory(limit, used, row, tmp_path, monkeypatch):
    (tmp_path / limit).write_text(f"{2**32}\n")
    (tmp_path / used).write_text(f"{2**32 - 2**20}\n")
    kept = {"anon": 5, row.format("inactive"): 2**30, row.format("active"): 2**29, "file_mapped": 7}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in kept.items()))
    groups = [(tmp_path, *rest) for _, *rest in hardware.CGROUPS]
    monkeypatch.setattr(hardware, "CGROUPS", groups)
    available, total = hardware.host_memory()
    assert total == 2**32 and available == 2**20 + 2**30 + 2**29


def test_instructions_are_asked_for_where_the_system_does_not_list_them(tmp_path, monkeypatch):
    listed = hardware.cpu_flags()
    monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / "nowhere")
    assert hardware.cpu_flags.__wrapped__() == listed & hardware.ASKED.keys()


def test_a_plan_says_what_it_counts_of_host_memory():
    for device, some in (("h200", False), ("laptop-8gb", True)):
        plan = make_plan(need("klein-9b"), from_preset(device))
        assert bool(plan.host_bytes) == some
        told = f"{show_bytes(plan.host_bytes)} of host memory for weights that wait (the process's own comes on top)"
        assert told in explain(plan)


def test_a_budget_of_nothing_is_not_the_whole_card():
    with pytest.raises(RequestError, match="vram: .*no memory"):
        make_settings(vram="0GiB")
    with pytest.raises(BudgetError):
        make_plan(need(), from_preset("rtx-4090"), Wishes(vram=0))


def test_tiers_differ_where_they_can(dev_folder, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    hw = probe("cpu")
    plans = {t: make_plan(need_of(dev_folder, t), hw) for t in ("none", "regular")}
    assert plans["none"].dtype == "float32" and plans["regular"].dtype == "bfloat16"
    assert built(plans["none"]) != built(plans["regular"])


def test_a_machine_without_bfloat16_computes_in_float32(dev_folder, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    plan = make_plan(need_of(dev_folder, "regular"), probe("cpu"))
    assert plan.dtype == "float32"
    assert ("bfloat16", f"{probe('cpu').name} has no fast bfloat16 matrix products") in plan.choices[0].rejected


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "rtx-9999", "tpu"])
def test_devices_that_are_not_here(dev_folder, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(PlanError):
        Flux2.load(dev_folder, device=device)


def test_a_cards_description_cannot_generate(dev_folder):
    with pytest.raises(PlanError, match="plan"):
        Flux2.load(dev_folder, device="rtx-4090")


def test_survey_lists_every_model_with_its_state():
    rows = {row.preset.name: row for row in survey()}
    assert list(rows) == list(models())
    assert rows["dev"].state == "not here, gated" and rows["klein-4b"].state == "not here"
    assert "fits" in fit(models()["klein-4b"], from_preset("h200"))
    small = from_preset("laptop-8gb", parse_bytes("16GiB"))
    assert "streamed" in fit(models()["dev"], small)
    assert "does not fit" in fit(models()["dev"], replace(small, free=parse_bytes("2GiB")))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * 2**30),
        ("24 GB", 24 * 10**9),
        ("800mb", 8 * 10**8),
        (7, 7),
        (12e9, 12 * 10**9),
        ("1.5GiB", 3 * 2**29),
    ],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "12 apples", "-3GB", "1.2.3GB", "0GiB", "0.1B", 0, -7, 0.2, float("inf"), float("nan")]
)
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [(512, 512), (1024, 768), (513, 1000)])
@pytest.mark.parametrize("name", ["dev", "klein-4b"])
def test_decoding_flops_are_those_that_torch_counts(name, size):
    arch = family_architecture(models()[name])
    vae = costs.network(arch, "vae")
    latents = torch.empty(1, 128, -(-size[1] // arch.multiple), -(-size[0] // arch.multiple), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latents)
    assert costs.decode_flops(arch, *size) == counter.get_total_flops()
