"""``benchmarks/speed.py``: adherence in a result; and the README's table of ratios."""

import shlex

import numpy as np
import pytest
from test_bench import made_up, row
from typer.testing import CliRunner

from benchmarks import judge, speed
from flux2_local.bench import compare, report, results, runner
from flux2_local.bench.contenders import select
from flux2_local.bench.environment import RESULTS, ROOT
from flux2_local.bench.subject import PROMPTS, Judged
from flux2_local.cli import app
from flux2_local.cli.bench import app as bench
from flux2_local.errors import RequestError
from scripts.train_tiny.render import render


def test_adherence_stands_beside_the_other_figures():
    pictures = {
        name: [np.full((8, 8, 3), value, np.uint8)] for value, name in enumerate(("standard, none", "flash"), 1)
    }
    samples = {
        name: runner.Samples({}, 1.0, drawn=[runner.Drawn(one, 1.0) for one in drawn])
        for name, drawn in pictures.items()
    }
    judged = Judged(PROMPTS, lambda drawn: ["1" * int(one.max()) + "000" for one in drawn], lambda *_: ["1111"])
    rows = [made_up(name, "ours", 1.0, 40.0) for name in samples]
    rows = results.with_adherence(rows, runner.Outcome(samples), judged)
    assert [(row.adherence, row.asked) for row in rows] == [(25.0, 4), (40.0, 5)]
    assert "| 40 % of 5 |" in results.table(rows)


def test_adherence_is_compared_in_the_same_things_with_its_error():
    before = ["1100", "111000", "11", "0000"]
    assert results.paired(before, before) == (0.0, 0.0)
    change, error = results.paired(before, ["1110", "111000", "11", "1000"])
    assert change == 100 * 2 / 16 and 4 < error < 10
    rng = np.random.default_rng(0)
    runs = [
        results.paired(*(["".join(map(str, rng.integers(0, 2, 8))) for _ in range(40)] for _ in range(2)))
        for _ in range(200)
    ]
    assert np.std([change for change, _ in runs]) == pytest.approx(np.mean([error for _, error in runs]), rel=0.15)
    assert results.paired(before[:1], before[:1]) == (None, None)
    row = results.with_verdicts(made_up("flash", "ours", 1.0, 40.0), ["1110", "111000", "11", "1000"], before)
    assert results.adherence(row) == f"56 % of 16 (+12.5 ± {error:.1f})"


def test_the_judge_finds_what_was_asked_for_and_misses_what_was_not():
    scenes, judged = judge.held_out_scenes(12), speed.judged()
    asked, others = ([np.asarray(render(s, 256, 256)) for s in some] for some in (scenes, scenes[::-1]))
    right = "".join(judged.judge(asked))
    assert right == "".join(judged.ceiling(256, 256, 12)) and right.count("1") > 0.95 * len(right)
    missed = "".join(judged.judge(others))
    assert len(missed) == len(right) and missed.count("1") < 0.6 * len(right)


def test_the_judge_is_for_the_bundled_model_alone(dev_folder):
    answer = CliRunner().invoke(bench, ["--model", str(dev_folder), "--rounds", "1"], obj=speed.judged())
    assert isinstance(answer.exception, RequestError) and "flux2-local bench" in str(answer.exception)


@pytest.mark.parametrize(("asked", "verdict"), [(50, ""), (5000, "worse")])
def test_adherence_changes_beyond_the_error_of_its_share(asked, verdict):
    old, new = (row([1.0], adherence=share, asked=asked) for share in (92.0, 88.0))
    assert {c.figure: c.verdict for c in compare.changes_of(old, new)} == {"seconds": "", "adherence": verdict}


def test_the_readmes_ratios_are_those_of_the_newest_result():
    newest = max(RESULTS.glob("speed-*.json"), key=lambda path: compare.read(path)["date"])
    written = (ROOT / "README.md").read_text("utf-8").split(report.BEGIN)[1].split(report.END)[0]
    assert written == report.ratios(compare.read(newest), newest.relative_to(ROOT).as_posix())


def test_the_readmes_command_is_the_one_that_wrote_its_result():
    readme = (ROOT / "README.md").read_text("utf-8").replace("\\\n", "")
    (line,) = (line for line in readme.splitlines() if line.startswith("flux2-local bench --model build/klein-4b"))
    words = shlex.split(line)[2:]
    asked = list(zip(words[::2], words[1::2], strict=True))
    options = dict(asked)
    record = compare.read(ROOT / options["--out"])
    assert record["model"] == options["--label"] and options["--out"] in readme.replace(line, "")
    facts = {"--steps": record["steps"], "--rounds": record["rounds"], "--limit": record["limit"]}
    assert {name: float(options[name]) for name in facts} == facts
    only = [value for name, value in asked if name == "--only"]
    ran = {row["name"] for row in record["rows"]}.union(*record["refused"].values())
    assert ran == {contender.name for contender in select(only)}
    assert {row["size"] for row in record["rows"]} == {options["--size"].replace("x", "×")}


def test_ratios_replace_what_stands_between_the_markers(tmp_path):
    newest = max(RESULTS.glob("speed-*.json"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    assert CliRunner().invoke(app, ["bench", "report", str(newest), "--into", str(page)]).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}after\n") and "old" not in text
    assert "| standard, none | " in text and "rounds" in text and not list(tmp_path.glob("*.png"))
    page.write_text("no markers")
    answer = CliRunner().invoke(app, ["bench", "report", str(newest), "--into", str(page)])
    assert isinstance(answer.exception, RequestError) and report.BEGIN.strip() in str(answer.exception)
    assert page.read_text() == "no markers"
