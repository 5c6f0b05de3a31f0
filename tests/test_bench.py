"""Benchmarks: contenders in their own processes, what they keep, and comparing two results."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flux2_local import Flux2, costs, hardware
from flux2_local.bench import compare, contenders, environment, measurement, metrics, peers, report, results, runner
from flux2_local.bench.contenders import CONTENDERS
from flux2_local.bench.runner import Rules
from flux2_local.bench.subject import PROMPTS, Subject
from flux2_local.cli import app
from flux2_local.costs import Work
from flux2_local.errors import BudgetError, RequestError
from flux2_local.progress import Reporter
from flux2_local.request import ACCELERATIONS, VARIANTS

SUBJECT = Subject("tiny", "cpu", 512, 512, 4)


def run(contenders, subject=SUBJECT, rules=Rules(1), say=print):  # noqa: B008 - frozen
    *_, outcome = runner.run(contenders, subject, PROMPTS, rules, say)
    return outcome


@pytest.fixture(scope="module")
def outcome():
    return run([CONTENDERS[n] for n in ("standard, none", "flash", "diffusers, model offload")])


@pytest.mark.slow
def test_the_exact_tier_has_the_stock_pipelines_pixels():
    chosen = contenders.select(["diffusers"])
    rows = results.rows(run(chosen, rules=Rules(1, apart=True)), SUBJECT, {"float32": 1e11})
    quality = {row.name: row.psnr for row in rows}
    assert quality["standard, none"] == metrics.SAME and quality["diffusers"] > 70


def test_each_contender_is_held_against_the_exact_tier(outcome):
    assert list(outcome.samples) == ["standard, none", "flash"]
    rows = {row.name: row for row in results.rows(outcome, SUBJECT, {"float32": 1e11, "bfloat16": 1e11})}
    assert rows["standard, none"].psnr == metrics.SAME and rows["standard, none"].gmsd == 0
    assert rows["flash"].psnr < 60 and rows["flash"].steps == 4
    for row in rows.values():
        assert row.load_seconds > 0 and row.first_seconds > 0 and row.host_bytes > 2**26
        assert row.fastest <= row.seconds <= row.slowest and row.share > 0
    assert json.loads(json.dumps(asdict(rows["flash"])))["plan"]["dtype"]


def test_what_cannot_run_says_why(outcome):
    assert "needs cuda" in outcome.refused["diffusers, model offload"]


def test_a_contender_that_fails_is_a_result_and_the_others_go_on():
    missing = replace(SUBJECT, model="/nowhere/model")
    said = []
    outcome = run([CONTENDERS["flash"]], missing, say=said.append)
    assert not outcome.samples and "/nowhere/model" in outcome.refused["flash"] and said[0].startswith("flash: ")
    assert results.rows(outcome, missing, {}) == []


def test_what_the_host_cannot_hold_is_not_tried(monkeypatch):
    small = replace(peers.probe("cpu"), free=2**20)
    monkeypatch.setattr(peers, "probe", lambda device: small)
    with pytest.raises(BudgetError, match=r"its weights are .* 1.0 MiB of memory are free"):
        peers.pipeline(SUBJECT)


def test_without_the_stock_pipeline_its_16_bit_form_is_the_base(outcome):
    taken = outcome.samples
    both = {"flash": taken["flash"], contenders.IN_16_BIT: taken["standard, none"]}
    rows = results.rows(replace(outcome, samples=both), SUBJECT, {"float32": 1e11, "bfloat16": 1e11})
    assert [row.ratio == 1 for row in rows] == [False, True] and rows[1].psnr == metrics.SAME


def test_an_unknown_contender_is_refused_with_the_list():
    with pytest.raises(RequestError, match="torchao int8"):
        contenders.select(["nobody"])
    assert [c.name for c in contenders.select(["flash"])] == ["diffusers", "standard, none", "flash"]


def test_every_tier_of_every_variant_can_be_measured():
    every, usual = ({c.name for c in contenders.select(None, every)} for every in (True, False))
    assert every == set(CONTENDERS) and every - usual == {"turbo, none", "turbo, high", "flash, none", "flash, high"}
    variants = {(how["variant"], how["acceleration"]) for c in CONTENDERS.values() if (how := getattr(c.build, "keywords", {}))
                and "variant" in how}  # fmt: skip
    assert variants == set(itertools.product(VARIANTS, ACCELERATIONS))


def test_what_was_not_asked_for_is_said():
    rows = [asdict(made_up("flash", "ours", 0.3, 14.0))]
    record = {"rows": rows, "refused": {"512x512": {"torchao fp8": "no card"}}, "not_asked": ["turbo", "cache-dit"]}
    assert report.not_measured(record) == "Not asked for in this run: turbo; cache-dit."
    assert report.not_measured(record | {"not_asked": []}) == ""
    del record["not_asked"]
    assert not {"flash", "torchao fp8"} & set(report.not_measured(record).rstrip(".").partition(": ")[2].split("; "))


def test_skipped_blocks_are_not_counted_as_computed():
    drawn = [
        runner.Drawn(np.zeros((8, 8, 3), np.uint8), 2.0, {"denoise": 1.0}, skipped) for skipped in ((0, 0), (3, 15))
    ]
    rates = {"float32": 1e11, "copy": 1e10}
    whole, part = (
        results.row("flash", runner.Samples({"dtype": "float32", "steps": 4}, 1.0, drawn=[one]), one_of(drawn), one_of(drawn),
                    SUBJECT, rates)
        for one in drawn
    )  # fmt: skip
    assert whole.tflop_per_s == part.tflop_per_s and whole.share == pytest.approx(whole.tflop_per_s / 0.1)
    assert part.skipped == [3, 15]
    arch = results.architecture(SUBJECT)
    tokens = arch.tokens(512, 512) + arch.text_tokens
    double, single = costs.one_block_flops(arch, tokens, tokens)
    assert double + 5 * single == pytest.approx(
        costs.step_flops(arch, Work(512, 512)), rel=0.01
    )  # all but the first and the last layer
    assert (whole.share - part.share) * 2.0 * 1e11 == pytest.approx(3 * double + 15 * single)
    assert part.copy_share == pytest.approx(whole.copy_share / 4, rel=0.05)
    assert results.share(part).startswith(f"{part.share:.0%}") and results.share(replace(part, skipped=None))[0] == "≤"


def one_of(drawn):
    return runner.Samples({}, 1.0, drawn=drawn[:1])


def test_a_type_whose_rate_was_not_measured_has_no_share():
    drawn = [runner.Drawn(np.zeros((8, 8, 3), np.uint8), 2.0, {"denoise": 1.0})]

    def found(rates, **facts):
        taken = runner.Samples({"steps": 4, **facts}, 1.0, drawn=drawn)
        return results.row("flash", taken, taken, taken, SUBJECT, {"copy": 1e10, **rates})

    for row in (
        found({"float32": 1.0}, dtype="bfloat16"),
        found({"float32": 1.0}, dtype="float32", products="q8_0"),
        found({"bfloat16": 1.0}, dtype="bfloat16", products="builtin-int8"),
    ):
        assert row.share is None and row.tflop_per_s > 0 and results.share(row) == ""
        assert row.copy_share is None or row.dtype == "bfloat16"
        assert "| 2.00 |" in results.table([row])
    assert found({"float32": 1e11}, dtype="float32", products="float32").share > 0


def test_rates_are_measured_of_every_type_that_a_contender_takes_where_the_device_is_slow_in_it(monkeypatch):
    monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda: False)
    slow = hardware.look("cpu")
    assert slow.fast_dtypes == ("float32",) and "bfloat16" in measurement.products(slow)
    old = replace(
        hardware.from_preset("rtx-3090"), sm=75, fast_dtypes=("float16",)
    )  # stock diffusers is bfloat16 there
    assert set(measurement.products(old)) == {"float32", "bfloat16", "float16"}


def test_what_quantized_contenders_multiply_in_is_told():
    loaded = contenders.ours(SUBJECT, "standard", "high", quantize="builtin-int8")
    assert loaded.facts["products"] == "builtin-int8" and loaded.facts["dtype"] in ("float32", "bfloat16")
    assert contenders.ours(SUBJECT, "standard", "none").facts["products"] == "float32"
    assert peers.PRODUCTS[CONTENDERS["torchao int8"].change] == "int8"


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024)])
def test_the_plan_that_drew_is_recorded(size):
    width, height = size
    loaded = contenders.ours(replace(SUBJECT, width=width, height=height), "standard", "high")
    _, told = loaded.draw("a boat", 1, None)
    flux = Flux2.load("tiny", acceleration="high", device="cpu")
    plan = flux._run({"prompt": "a boat", "image_size": {"width": width, "height": height},
                      "num_inference_steps": SUBJECT.steps}, Reporter()).plan  # fmt: skip
    assert told.plan == {choice.what: choice.value for choice in plan.choices}
    taken = runner.Samples({"dtype": "float32", "steps": 4}, 1.0)
    taken.add(np.zeros((8, 8, 3), np.uint8), {"seconds": 1.0, "memory": {}, **asdict(told)})
    assert results.row("standard, high", taken, taken, taken, SUBJECT, {}).plan == told.plan


def test_equal_pictures_are_the_nearest():
    picture = np.zeros((2048, 2048, 3), np.uint8)
    nearly = picture.copy()
    nearly[0, 0, 0] = 1
    assert 119 < metrics.psnr(picture, nearly) < metrics.psnr(picture, picture) == metrics.SAME


def test_psnr_is_of_the_error_over_all_pictures():
    base, off = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 10, np.uint8)
    against = runner.Samples({}, 1.0, drawn=[runner.Drawn(base, 1.0) for _ in range(2)])
    taken = runner.Samples({"dtype": "float32", "steps": 4}, 1.0, drawn=[runner.Drawn(p, 1.0) for p in (base, off)])
    row = results.row("flash", taken, against, against, SUBJECT, {})
    assert row.psnr == pytest.approx(metrics.decibels(50)) and row.differ == 50


def test_the_blocks_that_a_cache_skips_are_told():
    loaded = contenders.ours(replace(SUBJECT, steps=8), "standard", "high")
    _, told = loaded.draw("a boat", 1, None)
    assert told.skipped == (2, 10) and told.stages["denoise"] > 0  # a double and five single blocks in steps 3 and 5
    _, told = contenders.ours(SUBJECT, "standard", "none").draw("a boat", 1, None)
    assert told.skipped == (0, 0)


def test_the_numbers_of_marks_stand_on_nothing():
    crowd = [(100.0, 50.0)] * 5 + [(104.0, 50.0), (100.0, 60.0), (300.0, 20.0)]
    found = report.places(crowd)
    assert all(report.apart(place, other) for i, place in enumerate(found) for other in (*crowd, *found[:i]))
    assert max(abs(a - b) for a, b in zip(found[-1], crowd[-1], strict=True)) < report.LED  # beside its mark


def test_gmsd_grows_with_damage():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    noisy = [np.clip(picture + rng.normal(0, s, picture.shape), 0, 255).astype(np.uint8) for s in (2, 40)]
    same, little, much = (metrics.gmsd(picture, p) for p in (picture, *noisy))
    assert same == 0 and 0 < little < much


def row(seconds, **more):
    return {"size": "512×512", "name": "flash", "seconds": sorted(seconds)[len(seconds) // 2], "fastest": min(seconds),
            "slowest": max(seconds), "samples": seconds, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([1.0, 1.2, 1.1, 1.1], ""),
        ([1.5, 1.6, 1.7, 1.6], "worse"),
        ([0.5, 0.6, 0.7, 0.6], "better"),
        ([1.21, 1.1, 1.3, 1.2], ""),
        ([2.0, 2.1, 2.2], ""),
        ([2.0], ""),
    ],
)
def test_only_what_lies_outside_the_spread_has_changed(after, verdict):
    (change,) = compare.changes_of(row([1.0, 1.1, 1.2, 1.1]), row(after))
    assert change.verdict == verdict
    (back,) = compare.changes_of(row(after), row([1.0, 1.1, 1.2, 1.1]))
    assert back.verdict == {"": "", "worse": "better", "better": "worse"}[verdict]


def test_single_samples_are_not_judged_and_that_is_said():
    one, other = (
        {"rows": [row([seconds], ratio=ratio, ratios=[ratio])]} for seconds, ratio in ((1.0, 2.0), (9.0, 0.2))
    )
    found = compare.compare(one, other)
    assert not any(change.verdict for change in found.changes)
    assert found.caveats == ("times are not judged, for which 4 samples a side are needed: 512×512 flash",)


def test_memory_quality_and_ratio_are_compared():
    old = row([1.0, 1.1] * 2, ratio=2.0, ratios=[1.9, 2.1] * 2, host_bytes=100, psnr=40.0)
    new = row([1.0, 1.1] * 2, ratio=3.0, ratios=[2.9, 3.1] * 2, host_bytes=110, psnr=39.0)
    verdicts = {change.figure: change.verdict for change in compare.changes_of(old, new)}
    assert verdicts == {"seconds": "", "ratio": "better", "host_bytes": "worse", "psnr": "worse"}


def test_a_slower_machine_is_no_change_where_the_ratio_stays():
    old, new = (row([s, 1.1 * s] * 2, ratio=2.0, ratios=[1.9, 2.1] * 2) for s in (1.0, 1.3))
    assert [(change.figure, change.verdict) for change in compare.changes_of(old, new)] == [
        ("seconds", ""),
        ("ratio", ""),
    ]


def test_one_that_fails_is_worse_and_one_that_fails_no_longer_better():
    ran = {"rows": [row([1.0, 1.1] * 2)], "refused": {}}
    for rows in ([], [row([1.0])]):
        failed = {"rows": rows, "refused": {"512×512": {"flash": "RuntimeError: no"}}}
        found, back = compare.compare(ran, failed), compare.compare(failed, ran)
        assert [(c.figure, c.before, c.after) for c in found.worse] == [("pictures", 4, len(rows))]
        assert "refused after: 512×512 flash: RuntimeError: no" in found.caveats
        assert not back.worse and back.changes[0].verdict == "better" and str(back.changes[0]).endswith("better")
        assert not compare.compare(failed, failed).worse
    gone = compare.compare(ran, {"rows": [], "refused": {}})  # nobody asked for it
    assert not gone.changes and gone.caveats == ("only before: 512×512 flash",)


@pytest.mark.parametrize(
    "name",
    [
        "held_against",
        "apart",
        "limit",
        "threads",
        "transformers",
        "cuda",
        environment.DRIVER,
        "stable-diffusion-cpp-python",
    ],
)
def test_what_makes_results_less_comparable_is_said(name):
    one, other = ({"rows": [], name: value} for value in ("a", "b"))
    assert compare.compare(one, other).caveats == (f"{name}: a before, b after",)


def test_the_psnr_of_equal_pictures_is_read_as_todays(tmp_path):
    kept = tmp_path / "old.json"
    kept.write_text(json.dumps({"rows": [row([1.0], psnr=99.0, differ=0.0), row([1.0], psnr=99.6, differ=0.1)]}))
    assert [row["psnr"] for row in compare.read(kept)["rows"]] == [metrics.SAME, 99.6]


def test_compare_on_the_command_line(tmp_path):
    paths = []
    for name, seconds in (("a", [1.0, 1.1] * 2), ("b", [2.0, 2.1] * 2)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"device": name, "rows": [row(seconds)]}))
    invoke = partial(CliRunner().invoke, app)
    worse = invoke(["bench", "compare", *map(str, paths)])
    assert worse.exit_code == 1 and "worse" in worse.output and "device: a before, b after" in worse.output
    assert invoke(["bench", "compare", *map(str, reversed(paths)), "--json"]).exit_code == 0
    (tmp_path / "c.json").write_text("{}")
    assert isinstance(invoke(["bench", "compare", str(paths[0]), str(tmp_path / "c.json")]).exception, RequestError)


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv=['flux2-local','bench','--help']\n"
        "try:\n from flux2_local.cli import main; main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "compare" in done.stdout and done.stdout.endswith("False\n")


def made_up(name, group, seconds, psnr):
    facts = dict.fromkeys(
        ("ratio", "ssim", "gmsd", "differ", "differ_more", "load_seconds", "first_seconds", "tflop_per_s", "share"), 1.0
    )
    return results.Row(
        size="512x512", name=name, group=group, note=f"what {name} is", dtype="float32", steps=28, seconds=seconds,
        fastest=seconds, slowest=seconds, psnr=psnr, host_bytes=1, device_bytes=0, samples=[seconds], ratios=[1.0], **facts,
    )  # fmt: skip


def test_a_result_becomes_a_page_with_a_plot_for_every_size(tmp_path):
    rows = [
        made_up("standard, none", "ours", 2.0, metrics.SAME),
        made_up("standard, high", "ours", 0.5, 35.0),
        made_up("diffusers, 16 bit", "peer", 1.0, 33.0),
        made_up("flash", "ours", 0.3, 14.0),
    ]
    assert [row.name for row in report.frontier(rows[:3])] == ["standard, high", "standard, none"]
    record = {"model": "tiny", "steps": 28, "rounds": 5, "torch": "2.13", "refused": {"512x512": {"fp8": "no card"}}}
    record["held_against"] = {"512x512": {"quality": "diffusers, 16 bit", "speed": "diffusers, 16 bit"}}
    kept = tmp_path / "result.json"
    kept.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}))
    answer = CliRunner().invoke(app, ["bench", "report", str(kept)])
    page, plot = tmp_path / "result.md", tmp_path / "result-512x512.png"
    assert answer.exit_code == 0 and str(page) in answer.stdout and str(plot) in answer.stdout
    text = page.read_text()
    assert "does not say why it has no figures of: diffusers; standard, regular;" in text
    assert "| × diffusers, 16 bit |" in text
    assert "torch: 2.13" in text and "what flash is" in text and "fp8 at 512x512: no card" in text and plot.name in text
    with Image.open(plot) as picture:
        assert picture.size == (1260, 660) and len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_rows_are_held_against_what_the_result_names_and_only_equal_pictures_are_equal():
    sizes = {"quality": "diffusers, 16 bit", "speed": "diffusers, 16 bit"}
    record = {"model": "klein", "device": "cpu", "date": "2026-11-26", "steps": 4, "rounds": 1, "refused": {}}
    rows = {
        "standard, none": replace(made_up("standard, none", "ours", 2.0, metrics.SAME), differ=0.0),
        "diffusers, 16 bit": replace(made_up("diffusers, 16 bit", "peer", 1.0, metrics.SAME), differ=0.0),
        "flash": replace(made_up("flash", "ours", 1.0, 107.1), differ=1e-4),
        "stable-diffusion.cpp": made_up("stable-diffusion.cpp", "peer", 9.0, 9.2),
    }
    record |= {"rows": [asdict(row) for row in rows.values()], "held_against": {"512x512": sizes}}
    page = report.ratios(record, "here")
    assert "| × diffusers, 16 bit | PSNR in dB to diffusers, 16 bit |" in page
    ends = ("equal", "reference", "107.1", "other noise")
    assert [line.split(" | ")[5] for line in page.splitlines() if line.startswith("| 512x512")] == list(ends)
    read = {row.name: row for row in report.read_rows(record)}
    assert read["stable-diffusion.cpp"].psnr is None and report.other_picture(read["stable-diffusion.cpp"])
    table = results.table(list(read.values()), report.references(record)[1])
    assert "× diffusers, 16 bit" in table and "| 9.2 |" not in table and "| 107.1 |" in table
    del record["held_against"]  # as kept by earlier versions
    assert report.held(record, "512x512") == ("standard, none", "diffusers, 16 bit")


def test_a_plot_says_what_it_holds_pictures_against(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda self, text: texts.append(text))
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **_: texts.append(text))
    rows = [made_up(*facts) for facts in (
        ("diffusers, 16 bit", "peer", 1.0, metrics.SAME), ("flash", "ours", 1.0, 30.0), ("standard, high", "ours", 1.0, 107.1),
        ("stable-diffusion.cpp", "peer", 9.0, None),
    )]  # fmt: skip
    report.plot(rows, tmp_path / "plot.png", "diffusers, 16 bit")
    assert texts == [
        "PSNR in dB to diffusers, 16 bit (60 and more at 60)", "1  diffusers, 16 bit: 1.00 s, reference", "2  flash: 1.00 s",
        "3  standard, high: 1.00 s, 107.1 dB", "4  stable-diffusion.cpp: 9.00 s",
    ]  # fmt: skip


def test_the_environment_names_what_a_figure_depends_on():
    found = environment.record("cpu")
    assert {"numpy", "accelerate"} <= found.keys() and found["threads"] >= 1 and found["ram"] > 2**28
    assert set(found["instructions"].split()) <= hardware.cpu_flags()
    assert "stable-diffusion-cpp-python" in environment.PACKAGES


def test_the_extras_of_the_make_targets_have_what_contenders_need():
    makefile = (environment.ROOT / "Makefile").read_text("utf-8")
    stamp = re.search(r"^\$\(VENV\)/\.bench:.*\n.*'\.\[(.+)\]'", makefile, re.M)
    for target in ("bench", "bench-suites", "gpu"):
        assert re.search(rf"^{target}: \$\(VENV\)/\.bench$", makefile, re.M)
    project = tomllib.loads((environment.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = project["dependencies"] + [line for extra in stamp[1].split(",") for line in extras[extra]]
    needed = {need for contender in CONTENDERS.values() for need in contender.needs}
    by_hand = {"stable-diffusion-cpp-python"}  # compiles for minutes, for models of another shape than the bundled one
    assert needed - by_hand <= {re.split(r"[^\w.-]", line)[0] for line in named}
    readme = (environment.ROOT / "README.md").read_text("utf-8")
    assert "flux2-local[bench]" in readme and all(f"pip install {name}" in readme for name in by_hand)
