"""``benchmarks/scaling.py``: what grows in its sweeps, and the exponents that it fits."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from benchmarks import scaling, synthetic
from flux2_local import attention
from flux2_local.bench.counts import count
from flux2_local.bench.environment import RESULTS
from flux2_local.errors import BackendUnavailableError
from flux2_local.hardware import from_preset
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import REFERENCE

CPU = torch.device("cpu")


def test_a_sweep_changes_one_thing():
    for sweep in ("tokens", "width", "depth"):
        own = [point for point in scaling.family() if point.sweep == sweep]
        shapes = {(p.config.width, p.config.num_layers, p.config.num_single_layers, p.grid) for p in own}
        assert [len({shape[i] for shape in shapes}) for i in range(4)] == {
            "tokens": [1, 1, 1, len(own)],
            "width": [len(own), 1, 1, 1],
            "depth": [1, len(own), len(own), 1],
        }[sweep]
    assert {point.config.width for point in scaling.family()} == {256, 512, 1024, 2048}


def test_the_exponent_of_a_power_is_found():
    points = [replace(point, samples=[0.1 * point.value**1.7]) for point in scaling.family()]
    found = scaling.exponents(points)
    assert list(found) == ["tokens", "width", "depth"]
    assert all(own["seconds"] == pytest.approx(1.7) for own in found.values())
    assert found["depth"]["flops"] == pytest.approx(1, abs=0.01) and found["width"]["flops"] > 1.7


def test_flops_are_those_that_a_step_makes():
    point = scaling.Point("tokens", 128, synthetic.small(256), (8, 8), 64)
    written_out = replace(
        REFERENCE, attend=attention.load("sdpa-math")
    )  # torch does not count its fused kernel on a CPU
    net = synthetic.transformer(point.config, written_out, torch.float32, CPU)
    assert count(synthetic.step(net, point.grid, point.text)).flops == pytest.approx(point.flops, rel=0.01)


def test_random_weights_are_the_same_every_time_and_keep_pictures_finite():
    made = [synthetic.transformer(synthetic.small(256), NATIVE, torch.bfloat16, CPU) for _ in range(2)]
    first, second = (synthetic.step(net, (4, 8), 16)() for net in made)
    assert torch.equal(first, second) and first.shape == (1, 32, 128) and 0.01 < first.float().std() < 100


def test_points_take_turns_and_each_has_its_samples():
    points = [scaling.Point("width", w, synthetic.small(w), (4, 4), 16) for w in (128, 256)]
    scaling.measure(points, CPU, rounds=2)
    assert [len(point.samples) for point in points] == [2, 2] and all(point.seconds > 0 for point in points)


def test_what_there_is_no_memory_for_is_said_and_the_other_points_are_kept(tmp_path, monkeypatch):
    step = synthetic.step

    def short(net, grid, text):
        if net.config.width == 256:
            return fail
        return step(net, grid, text)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(synthetic, "step", short)
    points = [scaling.Point("width", w, synthetic.small(w), (4, 4), 16) for w in (128, 256)]
    refused = scaling.measure(points, CPU, rounds=1)
    assert [len(point.samples) for point in points] == [1, 0] and refused == [
        "width 256: OutOfMemoryError: CUDA out of memory"
    ]
    monkeypatch.setattr(synthetic, "transformer", lambda *_: fail())
    assert scaling.measure(points, CPU, rounds=1)[0].startswith("width: OutOfMemoryError")
    assert scaling.exponents(points[:1]) == {}
    record = {"device": "a card", "dtype": "float32", "rounds": 1, "exponents": {}, "refused": refused}
    record["points"] = [points[0].record(1e12)]
    assert "- width 256: OutOfMemoryError" in scaling.keep(record, tmp_path / "scaling.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.md"]


def test_each_models_points_are_written_before_the_next_ones_are_measured(tmp_path, monkeypatch):
    def measure(points, *_):
        if points[0].sweep == "klein-9b":
            raise RuntimeError("killed")
        for point in points:
            point.samples.append(0.1 * point.value)
        return []

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "chosen", lambda *_: [list(scaling.full(name)) for name in ("klein-4b", "klein-9b")])
    monkeypatch.setattr(scaling.rates, "measure", lambda _, dtypes, seconds: dict.fromkeys(dtypes, 1e12))
    monkeypatch.setattr("sys.argv", ["scaling", "--device", "cpu", "--out", str(tmp_path / "scaling.json")])
    with pytest.raises(RuntimeError, match="killed"):
        scaling.main()
    record = json.loads((tmp_path / "scaling.json").read_text("utf-8"))
    assert {row["sweep"] for row in record["points"]} == {"klein-4b"} == set(record["exponents"])


def test_full_size_models_are_refused_where_they_do_not_fit():
    card = from_preset("rtx-4090")
    assert [group[0].sweep for group in scaling.chosen(["klein-4b", "klein-9b"], card)] == ["klein-4b", "klein-9b"]
    with pytest.raises(BackendUnavailableError, match="dev takes 60"):
        scaling.chosen(["dev"], card)


def test_where_none_is_named_those_are_measured_that_fit(capsys):
    card = from_preset("rtx-4090")
    assert [group[0].sweep for group in scaling.chosen(None, card)] == ["klein-4b", "klein-9b"]
    assert "left out: dev takes 60" in capsys.readouterr().out
    (group,) = scaling.chosen(None, replace(card, free=2**30))
    assert {point.sweep for point in group} == {"tokens", "width", "depth"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("scaling-*.json")), ids=lambda path: path.name)
def test_committed_pages_are_their_results(path):
    record = json.loads(path.read_text("utf-8"))
    assert path.with_suffix(".md").read_text("utf-8") == scaling.page(record, path.with_suffix(".png").name)
    by_sweep = {}
    for row in record["points"]:
        assert row["seconds"] == pytest.approx(statistics.median(row["samples"]))
        by_sweep.setdefault(row["sweep"], []).append(row)
    assert list(by_sweep) == list(record["exponents"])
