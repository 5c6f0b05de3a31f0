"""Benchmarks of full-size models on random weights (tiers, budgets): the same code at the bundled model's size."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import budgets, masks, synthetic, tiers
from benchmarks.verdicts import tally, told
from flux2_local import Flux2, load, presets
from flux2_local.bench.contenders import CONTENDERS
from flux2_local.cache import Recorded
from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.errors import BackendUnavailableError, RequestError
from flux2_local.hardware import from_preset, probe
from flux2_local.plan import ComponentPlan, make_plan
from flux2_local.presets import families
from flux2_local.settings import choose, make_settings
from flux2_local.store import find

CPU = torch.device("cpu")
CASE = budgets.Case("flux2-local", "tiny", "cpu", 0, 512, 512, 4)


def test_devs_folder_is_dev_without_its_large_weights(tmp_path):
    folder = synthetic.folder("dev", tmp_path / "dev")
    checkpoint = find(folder, "standard")
    assert checkpoint.preset.name == "dev"
    arch = load.architecture(checkpoint)
    assert arch.transformer.num_single_layers == families()["dev"]["transformer"]["num_single_layers"]
    assert arch.language.hidden_size == families()["dev"]["text_encoder"]["hidden_size"]
    hardware = from_preset("rtx-4090", 64 * 2**30)
    _, plan = choose(folder, make_settings("standard", "high", vram="12GiB"), hardware, Work())
    assert plan.peak_bytes < 12 * 2**30 and plan.transformer.placement == "streamed"
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 2**28


@pytest.mark.parametrize("quantize", ["none", "builtin-int8"])
def test_weights_are_drawn_as_the_plan_says_and_draw_a_picture(tmp_path, quantize):
    folder = synthetic.folder("tiny", tmp_path / "tiny")
    for part in ("transformer", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.write_bytes(b"")  # would be refused if it were read
    with synthetic.drawn():
        flux = Flux2.load(folder, acceleration="regular", device="cpu", quantize=quantize)
    block = flux._components.transformer.single_transformer_blocks[0].attn
    assert block.to_out.weight.dtype is (torch.int8 if quantize == "builtin-int8" else load.DTYPES[flux.plan.dtype])
    result = flux.generate("a boat", image_size={"width": 512, "height": 512}, num_inference_steps=4)
    assert result.images[0].image.getextrema()[0][0] < result.images[0].image.getextrema()[0][1]


def test_what_stays_on_the_device_is_not_on_the_host_in_between(monkeypatch):
    """The device is that which tensors cannot come back from."""
    monkeypatch.setattr(
        synthetic, "drawer", lambda device: lambda like, dtype: torch.empty(like.shape, dtype=dtype, device=device)
    )
    source, device = load.Source(find("tiny", "standard"), "transformer"), torch.device("meta")
    net = torch.nn.Linear(2, 2, device="meta")
    synthetic.fill_random(net, ComponentPlan("bfloat16", "resident"), "bfloat16", source, device)
    assert net.weight.is_meta and net.weight.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError):
        synthetic.fill_random(net, ComponentPlan("bfloat16", "streamed"), "bfloat16", source, device)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = synthetic.folder("tiny", tmp_path_factory.mktemp("models") / "tiny")
    return tiers.prepare(folder, probe("cpu"), 512, 512, 6, CPU)


def test_tiers_take_turns_on_the_same_weights_and_none_computes_what_diffusers_does(bench, monkeypatch):
    def broken(pipe, subject):
        raise RuntimeError("no compiler")

    name = "diffusers, compiled"
    monkeypatch.setitem(CONTENDERS, name, replace(CONTENDERS[name], change=broken))
    monkeypatch.setitem(CONTENDERS, "cache-dit", replace(CONTENDERS["cache-dit"], needs=("nowhere-to-be-found",)))
    monkeypatch.setattr(masks, "read", lambda *_: Recorded(math.inf, 1, 0, 4, 6, skips=(2, 3, 5)))
    names = ["none", "regular, mask", "high, int8", "high, fp8", name, "cache-dit"]
    seen = []
    for outcome in tiers.measure(bench, names, rounds=1):
        rows = tiers.figures(outcome.measured, bench, {"bfloat16": 1e11, "float32": 1e11, "copy": 1e10})
        seen.append([row["name"] for row in rows])
    assert seen.index(["diffusers", "none"]) < seen.index(["diffusers", "none", "regular, mask"])  # known as they come
    assert outcome.refused["high, fp8"].startswith("BackendUnavailableError") and "cuda" in outcome.refused["high, fp8"]
    assert "no compiler" in outcome.refused[name] and "nowhere-to-be-found" in outcome.refused["cache-dit"]
    stock, none, masked, int8 = rows
    assert [row["name"] for row in rows] == ["diffusers", "none", "regular, mask", "high, int8"]
    assert [len(row["samples"]) for row in rows] == [3, 1, 1, 1]  # once beside each
    assert stock["ratio"] == 1 and none["error"] < 0.02 and int8["plan"]["weights"] == "builtin-int8"
    assert masked["skipped"] == (3, 15) and none["skipped"] == (0, 0)
    assert masked["plan"]["step cache"] == "recorded: 3 of 6 steps skipped"
    assert none["share"] == pytest.approx(none["tflop_per_s"] / 0.1)
    assert masked["share"] == pytest.approx(masked["tflop_per_s"] / 0.1 / 2, rel=0.02)
    assert 0 < masked["copy_share"] < none["copy_share"] * none["seconds"] / masked["seconds"]
    assert "regular, mask" in tiers.table(rows)


def test_where_the_stock_pipeline_fails_the_others_go_on(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiers.Bench, "stock", lambda self: tiers.Contender("diffusers", self.dtype, broken, broken))
    *_, outcome = tiers.measure(bench, ["none", "high, int8"], rounds=1)
    rows = tiers.figures(outcome.measured, bench, {"bfloat16": 1e11, "float32": 1e11, "copy": 1e10})
    assert "out of memory" in outcome.refused["diffusers"]
    assert [(row["name"], row["ratio"], row["error"]) for row in rows] == [
        ("none", None, None),
        ("high, int8", None, None),
    ]
    assert "| none |" in tiers.table(rows)
    assert "none: 1.4 times diffusers" in tally(tiers.aims(rows))["unjudged"]


def test_a_mask_of_another_number_of_steps_is_not_replayed(bench):
    with pytest.raises(RequestError, match="--steps 6"):
        bench.tier("high, mask")


def test_tiers_are_held_to_their_aims():
    rows = [{"name": name, "ratio": 2.0, "share": 0.7} for name in ("none", "regular, mask")]
    found = tally(tiers.aims(rows))
    assert found["reached"]["1.4 times diffusers"] == 1
    assert found["missed"] == ["regular, mask: 2.2 times diffusers", "none: 75% of the product rate"]
    assert found["unjudged"] == ["high, mask: 4.5 times diffusers", "regular: 75% of the product rate"]
    assert "missed: none: 75%" in told(found)


def test_tiers_that_do_not_fit_are_refused_before_anything_is_drawn(tmp_path):
    folder = synthetic.folder("tiny", tmp_path / "tiny")
    with pytest.raises(BackendUnavailableError, match="smaller model"):
        tiers.check_memory("tiny", load.architecture(find(folder, "standard")), replace(probe("cpu"), free=2**20))


@pytest.mark.parametrize(("card", "model"), [("h200", "dev"), ("h100", "klein-9b"), ("rtx-4090", "klein-4b")])
def test_the_largest_model_that_a_card_holds_is_taken(card, model):
    assert tiers.largest(from_preset(card)) == model


def test_a_card_that_holds_none_says_so():
    with pytest.raises(BackendUnavailableError, match="klein-4b's transformer"):
        tiers.largest(replace(from_preset("rtx-4090"), free=2**33))


def test_budgets_beyond_the_card_are_left_out(capsys):
    card = from_preset("rtx-4090")
    assert budgets.asked(None, card) == [10**9 * gb for gb in (24, 16, 12, 8)]
    assert "left out" in capsys.readouterr().out
    assert budgets.asked(["12GB"], card) == [12 * 10**9] and budgets.asked(None, probe("cpu")) == [0]
    with pytest.raises(RequestError, match="--budget"):
        budgets.asked(["80GB", "12GB"], card)
    with pytest.raises(BackendUnavailableError, match="--budget"):
        budgets.asked(None, replace(card, memory=2**32))


@pytest.mark.parametrize("contender", budgets.CONTENDERS)
def test_a_case_finds_seconds_and_a_peak(contender):
    row = budgets.work(replace(CASE, contender=contender))
    assert row["seconds"]["step"] > 0 and row["peak"] > 2**27
    assert ("predicted_peak" in row) == contender.startswith("flux2-local")
    if contender == budgets.INT8:
        assert row["plan"]["weights"] == "builtin-int8"
    told = budgets.line({"contender": contender, "budget": 0} | row)
    assert "a step" in told and "EXCEEDED" not in told
    assert "EXCEEDED" in budgets.line({"contender": contender, "budget": 1} | row)


def test_predictions_are_of_the_picture_that_is_drawn(tmp_path):
    """Not of the one that loading plans for."""
    folder = synthetic.folder("tiny", tmp_path / "tiny")
    flux = Flux2.load(folder, device="cpu")
    need = Need("tiny", "standard", presets.tiers()["regular"], load.architecture(flux.checkpoint), Work(512, 512, 4))
    plan = make_plan(need, flux.hardware, flux.settings)
    assert plan.step_seconds < flux.plan.step_seconds and plan.peak_bytes != flux.plan.peak_bytes
    row = budgets.ours(CASE, folder)
    assert row["predicted_seconds"]["step"] == pytest.approx(plan.step_seconds)
    assert row["predicted_peak"] == plan.peak_bytes
    assert row["plan"] == {choice.what: choice.value for choice in plan.choices}


def test_a_host_without_memory_has_blocks_come_from_their_files(tmp_path):
    """What the case of that name rests on, for a card that is not at hand."""
    folder = synthetic.folder(budgets.OTHERWISE, tmp_path / "klein-4b")
    settings = make_settings("standard", "regular", vram=8 * 10**9, quantize="none")
    rich = from_preset("h200", 64 * 2**30)
    checkpoint, _ = choose(folder, settings, rich, Work())
    arch = replace(load.architecture(checkpoint), stored="bfloat16")  # as the files that the case writes
    need = Need(checkpoint.name, "standard", presets.tiers()["regular"], arch, Work())
    for hardware, mapped in ((rich, False), (budgets.poor(rich), True)):
        plan = make_plan(need, hardware, settings)
        assert (plan.transformer.placement, bool(plan.transformer.mapped)) == ("streamed", mapped)


def test_weights_that_the_disk_has_no_room_for_are_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets.random_model.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    monkeypatch.setattr(budgets.synthetic, "folder", lambda size, path: tmp_path)
    row = budgets.work(replace(CASE, contender=budgets.FILES, model="klein-4b"))
    assert row["error"].startswith("OutputError") and "GiB are needed" in row["error"]
    monkeypatch.setattr(budgets.random_model.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * 10**9))
    assert budgets.that_fits("dev", tmp_path) == "klein-4b"


def test_budgets_are_held_to_their_aims():
    def reached(rows):
        return tally(budgets.aims(rows))["reached"]

    def row(contender, gb, step, **more):
        return {"contender": contender, "budget": gb * 10**9, "seconds": {"step": step}} | more

    failed, offload, group = (
        {"contender": name, "budget": 12 * 10**9, "error": error}
        for name, error in zip(budgets.THEIRS, ("OutOfMemoryError", "BudgetError", "not done"), strict=True)
    )
    rows = [
        row("flux2-local", 24, 0.50, predicted_seconds={"step": 0.45}),
        row("flux2-local", 12, 1.0, predicted_seconds={"step": 0.5}),
        row(budgets.INT8, 80, 0.4),
        row(budgets.INT8, 24, 0.43),
        row("diffusers, group offload", 12, 2.5),
        failed,
        offload,
    ]
    found = tally(budgets.aims(rows))
    assert found["missed"] == [
        "flux2-local, 11.2 GiB: predicted within 15%",
        "flux2-local: at 22.4 GiB within 1.1 times int8 fully resident",
    ]
    assert found["reached"]["predicted within 15%"] == 1
    assert found["reached"]["at 22.4 GiB within 1.1 times int8 fully resident"] == 1
    assert found["reached"]["at 11.2 GiB 2 times as fast as diffusers' best that fits"] == 1
    assert found["unjudged"] == [f"{budgets.INT8}: at 11.2 GiB 2 times as fast as diffusers' best that fits"]
    assert not any("times as fast" in aim and n for aim, n in reached([*rows[:2], failed, offload, group]).items())
    group["error"] = "OutOfMemoryError"
    assert "of which nothing fits" in str([aim for aim, n in reached([*rows[:2], failed, offload, group]).items() if n])


def test_every_budget_has_every_contender_and_the_smallest_the_files():
    names = ["flux2-local", budgets.FILES]
    assert budgets.cases([80, 8], names) == [(80, "flux2-local"), (8, "flux2-local"), (8, budgets.FILES)]


def test_what_aims_rest_on_comes_first_and_is_enough_for_them():
    sizes = budgets.asked(None, from_preset("h200"))
    every, first, others = (
        budgets.cases(sizes, list(budgets.CONTENDERS), which) for which in ("all", "aims", "others")
    )
    assert every == first + others and len(set(every)) == len(every) and len(first) == 8
    rows = [{"contender": c, "budget": b, "seconds": {"step": 1.0}} for b, c in first]
    assert not tally(budgets.aims(rows))["unjudged"]
    assert len(tally(budgets.aims(rows[:-1]))["unjudged"]) == 2  # diffusers' best is not known yet


def test_one_plan_is_measured_once():
    rows = [{"contender": "flux2-local", "budget": 24, "plan": {"weights": "builtin-int8"}, "peak": 7}]
    assert budgets.known(budgets.INT8, 24, rows)["peak"] == 7
    assert budgets.known(budgets.INT8, 24, rows)["contender"] == budgets.INT8
    assert budgets.known(budgets.INT8, 12, rows) is None and budgets.known("diffusers, resident", 24, rows) is None
    assert budgets.known(budgets.INT8, 24, [rows[0] | {"plan": {"weights": "bfloat16"}}]) is None


def test_what_other_processes_hold_is_not_the_cases(monkeypatch):
    case = replace(CASE, device="cuda:0", budget=10**10, others=3 * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 10**9, 90 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 8 * 10**9)
    assert case.peak() == 9 * 10**9 and budgets.held_by_others(from_preset("h200")) == 10 * 10**9


def test_diffusers_does_not_hold_weights_on_the_host_that_it_moves(monkeypatch, tmp_path):
    held, prepare = [], tiers.prepare
    monkeypatch.setattr(tiers, "prepare", lambda *given: held.append(prepare(*given)) or held[0])
    budgets.stock(CASE, synthetic.folder("tiny", tmp_path / "tiny"), lambda *_: held.append(dict(held[0].state)))
    assert held[1] == {}


def test_a_network_beyond_the_budget_is_not_drawn(monkeypatch):
    monkeypatch.setattr(tiers, "prepare", None)
    for contender in ("diffusers, resident", "diffusers, model offload"):
        row = budgets.work(replace(CASE, contender=contender, budget=10**6))
        assert row["error"].startswith("BudgetError: its transformer's weights are")


def test_what_does_not_fit_or_dies_is_a_row_and_not_the_end(monkeypatch):
    def short(case, folder):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(budgets.CONTENDERS, "flux2-local", short)
    assert budgets.work(CASE)["error"].startswith("OutOfMemoryError")
    row = budgets.measured(replace(CASE, device="meta"), limit=300)
    assert "error" in row and row["contender"] == "flux2-local" and json.dumps(row)
    assert "no budget" in budgets.line(row)
    assert budgets.measured(CASE, limit=0.01)["error"] == "it was not done after 0.01 seconds"
