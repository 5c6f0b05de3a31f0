"""``benchmarks/speed.py``: adherence in a result; and the README's table of ratios."""

import numpy as np
import pytest
from test_bench import made_up, row
from typer.testing import CliRunner

from benchmarks import judge, speed
from flux2_local.bench import compare, report, results, runner
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
    judged = Judged(PROMPTS, lambda drawn: (int(drawn[0].max()), 4), lambda *_: (4, 4))
    rows = [made_up(name, "ours", 1.0, 40.0) for name in samples]
    rows = results.with_adherence(rows, runner.Outcome(samples), judged)
    assert [(row.adherence, row.asked) for row in rows] == [(25.0, 4), (50.0, 4)]
    assert "| 50 % of 4 |" in results.table(rows)


def test_the_judge_finds_what_was_asked_for_and_misses_what_was_not():
    scenes, judged = judge.held_out_scenes(12), speed.judged()
    asked, others = ([np.asarray(render(s, 256, 256)) for s in some] for some in (scenes, scenes[::-1]))
    right, count = judged.judge(asked)
    assert (right, count) == judged.ceiling(256, 256, 12) and right > 0.95 * count
    missed, same = judged.judge(others)
    assert same == count and missed < 0.6 * count


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
