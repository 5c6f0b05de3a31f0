"""``flux2-local bench`` end to end with contenders that draw nothing: what ends it early, or one of them, loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_contenders import PROCESS
from fake_contenders import contenders as fakes
from PIL import Image
from test_bench import made_up

from flux2_local.bench import compare, contenders, measurement, report, results, runner
from flux2_local.bench.measurement import Wanted, measure
from flux2_local.bench.metrics import SAME
from flux2_local.bench.runner import Rules
from flux2_local.errors import OutputError

LIMIT = 4.0
"""Seconds: more than a process needs to start, and fewer than a slow contender takes."""
FAKES = fakes()


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Fakes among the contenders, in processes of their own; what they write down."""
    for name, fake in FAKES.items():
        monkeypatch.setitem(contenders.CONTENDERS, name, fake)
    monkeypatch.setattr(runner, "WORKER", PROCESS)
    monkeypatch.setattr(measurement.rates, "measure", lambda *_, **__: {"float32": 1e11})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def run(path, names, rules, say=print):
    wanted = Wanted("tiny", [(512, 512)], [FAKES[name] for name in names], rules, steps=4, device="cpu", out=path)
    return measure(wanted, say)


def read(path):
    """The file, and its rows by name."""
    record = compare.read(path)
    return record, {row["name"]: row for row in record["rows"]}


def test_every_round_is_in_the_file_when_it_ends(tmp_path, log, monkeypatch):
    path, seen, emptied = tmp_path / "result.json", [], []
    monkeypatch.setattr(measurement.rates, "give_back", emptied.append)

    def say(line):
        assert emptied  # of what measuring rates took, before any contender is there
        if "round" in line:
            seen.append((line, read(path)))

    run(path, ["quick", "steady"], Rules(2), say)
    assert [line for line, _ in seen] == ["512×512: round 1 of 2", "512×512: round 2 of 2"]
    for number, (_, (record, rows)) in enumerate(seen, 1):
        assert {len(row["samples"]) for row in rows.values()} == {number} and len(rows) == 2
        assert record["rounds_done"] == {"512×512": number - 1} and record["rounds"] == 2
    record, rows = read(path)
    assert record["rounds_done"] == {"512×512": 2} and not record["apart"]
    assert record["held_against"] == {"512×512": {"quality": "quick", "speed": "quick"}}
    assert rows["steady"]["psnr"] == SAME and rows["steady"]["differ"] == 0
    assert len(rows["steady"]["ratios"]) == 2 and rows["steady"]["host_bytes"] > 2**20


def test_apart_one_process_ends_before_the_next_begins(tmp_path, log):
    run(tmp_path / "result.json", ["quick", "steady"], Rules(2, apart=True))
    record, rows = read(tmp_path / "result.json")
    assert record["apart"] and all(len(row["samples"]) == 2 for row in rows.values())
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    begun = [(process, what) for process, what in lines if what.endswith("begins")]
    assert [what for _, what in begun] == ["quick begins", "steady begins"] * 2
    assert len({process for process, _ in begun}) == 4
    order = [process for process, _ in lines]
    assert order == sorted(order, key=order.index)  # nobody works on after another began


def test_what_does_not_fit_into_memory_together_is_kept_apart(tmp_path, log, monkeypatch):
    fits = measurement.probe("cpu")
    weights = 4 * 7_400_000  # of the bundled model's transformer alone
    subject = measurement.Subject("tiny", "cpu", 512, 512, 4)
    assert measurement.fit_together(list(FAKES.values()), subject)
    monkeypatch.setattr(measurement, "probe", lambda _: replace(fits, free=2 * weights))
    assert not measurement.fit_together(list(FAKES.values()), subject)


def test_one_that_takes_too_long_is_recorded_and_the_others_go_on(tmp_path, log):
    path = tmp_path / "result.json"
    run(path, ["quick", "slow", "slow to load", "slow to compile"], Rules(2, apart=True, limit=LIMIT))
    record, rows = read(path)
    assert list(rows) == ["quick", "slow"] and len(rows["quick"]["samples"]) == 2
    slow = rows["slow"]
    assert slow["more_than"] and slow["seconds"] == slow["limit"] == LIMIT and slow["samples"] == [LIMIT]
    assert slow["psnr"] is None and slow["ratio"] == rows["quick"]["samples"][0] / LIMIT
    refused = record["refused"]["512×512"]
    assert refused["slow"] == "more than 4 s for a picture, at which it was stopped"
    assert "loading it took more than 4 s" in refused["slow to load"]
    assert "for which it compiles, took more than 4 s" in refused["slow to compile"]
    if sys.platform == "linux":
        assert slow["host_bytes"] > 2**20
    table = results.table(report.read_rows(record))
    assert "| slow | > 4.00 |" in table and "| < 0.0" in table
    page, plot = report.report(record, tmp_path / "page.md")
    assert "slow at 512×512: more than 4 s" in page.read_text()
    with Image.open(plot) as picture:
        assert picture.width > 500


def test_a_death_keeps_what_was_drawn_before_it_and_its_last_word(tmp_path, log):
    run(tmp_path / "result.json", ["quick", "mortal"], Rules(3))
    record, rows = read(tmp_path / "result.json")
    assert len(rows["mortal"]["samples"]) == 1 and len(rows["quick"]["samples"]) == 3
    assert record["refused"]["512×512"] == {"mortal": "its process left with 3: a last word"}
    assert len(rows["quick"]["ratios"]) == 3 and len(rows["mortal"]["ratios"]) == 1


def test_the_first_picture_is_short_where_nothing_is_compiled(tmp_path, log):
    run(tmp_path / "a.json", ["quick", "compiling"], Rules(1))
    _, rows = read(tmp_path / "a.json")
    assert (rows["quick"]["first_steps"], rows["compiling"]["first_steps"]) == (1, 4)
    run(tmp_path / "b.json", ["quick", "compiling"], Rules(1, warm_steps=2))
    drawn = [line.split(" ", 1)[1] for line in log.read_text().splitlines() if "draws" in line]
    assert drawn[:2] == ["quick draws 0 in 1", "compiling draws 0 in None"]
    assert drawn[4:6] == ["quick draws 0 in 2", "compiling draws 0 in 2"]


def test_a_folder_is_made_with_the_first_result(tmp_path, log):
    path = tmp_path / "new" / "deep" / "result.json"

    def interrupted(line):
        raise KeyboardInterrupt

    assert run(path, ["quick"], Rules(1), interrupted).stopped
    assert not (tmp_path / "new").exists()
    run(path, ["quick"], Rules(1))
    assert path.exists()
    with pytest.raises(OutputError, match=r"a file has that name.*--out"):
        run(path / "below" / "result.json", ["quick"], Rules(1))


def test_the_result_calls_the_model_by_its_label(tmp_path, log):
    wanted = Wanted("tiny", [(512, 512)], [FAKES["quick"]], Rules(1), steps=4, device="cpu", label="a small one")
    measure(replace(wanted, out=tmp_path / "a.json"), print)
    measure(replace(wanted, out=tmp_path / "b.json", label=None), print)
    assert [read(tmp_path / name)[0]["model"] for name in ("a.json", "b.json")] == ["a small one", "tiny"]


def test_a_folder_is_no_result(tmp_path, log):
    with pytest.raises(OutputError, match=r"is a folder.*--out"):
        run(tmp_path, ["quick"], Rules(1))
    assert not log.exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_result_of_what_was_done(tmp_path, log, number):
    path = tmp_path / "result.json"
    shape = ["--size", "512x512", "--steps", "4", "--device", "cpu"]
    options = ["--only", "quick", "--only", "slow", "--apart", "--rounds", "9", *shape, "--out"]
    process = subprocess.Popen(
        [*PROCESS, *options, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (log.exists() and "slow draws" in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    workers = {int(line.split()[0]) for line in log.read_text().splitlines()}
    process.send_signal(number)
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said
    assert f"Stopped after 0 of 9 rounds at 512×512; what was measured is in {path}" in said and "| quick |" in printed
    record, rows = read(path)
    assert list(rows) == ["quick"] and record["rounds_done"] == {"512×512": 0}
    assert report.rounds(record) == "stopped after 0 of 9 rounds"
    assert not any(alive(worker) for worker in workers) and not list(tmp_path.glob(".*"))


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_bound_is_no_change_by_itself():
    def row(**more):
        return {**vars(made_up("flash", "ours", 1.0, None)), **more}

    bound = row(seconds=10.0, slowest=10.0, samples=[10.0], limit=10.0, more_than=True, ratios=[])
    stopped = {"rows": [bound], "refused": {bound["size"]: {"flash": "more than 10 s"}}}
    for other, forth, back in ((5.0, "worse", "better"), (20.0, "", "")):
        plain = {"rows": [row(seconds=other, slowest=other, samples=[other], ratios=[])], "refused": {}}
        found, returned = compare.compare(plain, stopped).changes, compare.compare(stopped, plain).changes
        assert (found[0].figure, found[0].verdict, returned[0].verdict) == ("pictures", forth, back)
        assert not any(change.verdict for change in (*found[1:], *returned[1:]))


def test_a_median_is_a_bound_where_it_falls_on_one(log):
    subject = measurement.Subject("tiny", "cpu", 512, 512, 4)
    picture = np.zeros((16, 16, 3), np.uint8)
    for seconds, expected in (([1.0, 2.0], (2.0, False)), ([1.0], (5.0, True)), ([], (9.0, True))):
        drawn = [runner.Drawn(picture, one) for one in seconds]
        taken = runner.Samples({"dtype": "float32", "steps": 4}, 1.0, drawn=drawn, exceeded=9.0)
        (found,) = results.rows(runner.Outcome({"quick": taken}), subject, {"float32": 1e11})
        assert (found.seconds, found.more_than) == expected
    assert json.loads(json.dumps(vars(found)))["psnr"] is None
